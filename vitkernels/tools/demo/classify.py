"""``vitkernels classify``: classify an image with a Vision Transformer of timm."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from vitkernels import runtime, swap
from vitkernels.models import weights as weights_file
from vitkernels.tools.console import UserError, busy, import_timm, one_line
from vitkernels.tools.demo import measure
from vitkernels.tools.demo.attention import class_token_attention, position_similarity
from vitkernels.tools.demo.figure import draw_classification
from vitkernels.tools.demo.image import open_image
from vitkernels.tools.names import build, read_config, resolve


def classify(image_path: Path, name: str, weights: Path | None, out: Path) -> None:
    """Print the five most likely classes of an image, and draw them into ``out``.

    Args:
        image_path: PNG, JPEG or WebP.
        name: A model of timm, in any form that :func:`vitkernels.tools.names.resolve` accepts.
        weights: A state dict (safetensors or ``torch.save``) or a training checkpoint, whose averaged weights (EMA) are
            preferred; None for timm's pretrained weights.
        out: File for the picture.

    Raises:
        UserError: A file, the name or a package is wrong or missing; the text says which.
    """
    picture = open_image(image_path)
    timm = import_timm()
    device = measure.pick_device()
    no_kernels = measure.why_no_kernels(device)
    with busy(f"Loading {name}"):
        model = load_model(name, weights).eval().to(device)
    config = timm.data.resolve_model_data_config(model)
    images = timm.data.create_transform(**config, is_training=False)(picture)[None].to(device)

    if no_kernels is None:
        truth = measure.fp64_logits(model, images)
        runs = {"plain": measure.run_torch(model, images, truth)}
        swap.accelerate(model).print()
        runs["accelerated"] = measure.run_kernels(model, images, truth)
        measure.print_runs(runs)
        logits = runs["accelerated"].logits[0]
    else:
        with runtime.use_backend("torch"), torch.inference_mode():
            swap.accelerate(model).print()
            logits = model(images)[0].cpu()
        print(f"The kernels did not run: {no_kernels}")

    probabilities, classes = logits.float().softmax(-1).topk(min(5, len(logits)))
    names = _class_names(timm, model, len(logits))
    top = [
        (names[i] if names else f"class {i}", p) for i, p in zip(classes.tolist(), probabilities.tolist(), strict=True)
    ]
    print(f"{image_path.name} by {name}:")
    for text, p in top:
        print(f"  {100 * p:5.1f} %  {text}")
    is_vit = isinstance(model, timm.models.vision_transformer.VisionTransformer)
    draw_classification(
        out,
        _as_seen(images[0], config),
        [(text.split(",")[0], p) for text, p in top],
        class_token_attention(model, images)[0] if is_vit and _has_readable_class_token(timm, model) else None,
        position_similarity(model) if is_vit else None,
        f"{image_path.name} by {name}",
    )
    print(f"Wrote {out}")


def load_model(name: str, weights: Path | None) -> nn.Module:
    """Build timm's model ``name`` with the weights at ``weights``, or with timm's pretrained ones.

    Raises:
        UserError: The model is unknown or has no head, or the weights are not available or do not fit.
    """
    named = resolve(name, may_download=True)
    if named.kind == "folder" and "architecture" not in read_config(named.name):
        raise UserError(f"{named.name} holds no model of timm; classify runs no other")
    named = named.for_timm
    if weights is None:
        model, _ = build(named, weights=True)
    else:
        state = read_weights(weights)
        head = state.get("head.weight")
        options = {} if head is None or head.ndim != 2 else {"num_classes": head.shape[0]}
        model, _ = build(named, **options)
        _check_fits(weights, state, model)
        model.load_state_dict(state)
    if not getattr(model, "num_classes", 0):
        raise UserError(f"{name} has no classification head; give fine-tuned weights that have one with --weights FILE")
    return model


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return :func:`vitkernels.models.weights.read_weights` of ``path``.

    Raises:
        UserError: The file is missing, broken, or does not map names to tensors.
    """
    try:
        state = weights_file.read_weights(path)
    except ImportError as error:
        raise UserError(f"{path} needs safetensors, which cannot be imported: pip install safetensors") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or one_line(error)}") from error
    except ValueError as error:
        raise UserError(one_line(error)) from error
    if not state:
        raise UserError(f"{path} holds no weights; expected tensors by name")
    return state


def _check_fits(path: Path, state: dict[str, Tensor], model: nn.Module) -> None:
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    wrong = [
        f"{name} has shape {tuple(state[name].shape)}, expected {shape}"
        for name, shape in wanted.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    wrong += [f"{name} is missing" for name in wanted if name not in state]
    wrong += [f"{name} is unexpected" for name in state if name not in wanted]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{path} does not fit the model: {'; '.join(wrong[:3])}{more}")


def _class_names(timm, model: nn.Module, classes: int) -> list[str] | None:
    """Return ImageNet's class names if the head has as many classes as one of its versions, else None."""
    subset = timm.data.infer_imagenet_subset(model)
    info = timm.data.ImageNetInfo(subset) if subset else None
    return info.label_descriptions() if info and info.num_classes() == classes else None


def _has_readable_class_token(timm, model: nn.Module) -> bool:
    block = model.blocks[-1]
    own_block = isinstance(block, timm.models.vision_transformer.Block)
    return model.has_class_token and own_block and isinstance(block.attn, timm.layers.Attention)


def _as_seen(image: Tensor, config: dict):
    """Undo the normalisation of ``image`` (3, Y, X), and return it as (Y, X, 3) from 0 to 1."""
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (image.cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
