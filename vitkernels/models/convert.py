"""Convert weights of timm, torchvision and transformers to :class:`VisionTransformer`, and back to timm.

Every source becomes two things: arguments of a model of this package, and a state dict with timm's names, which this
package uses. One error lists everything that does not fit; nothing is resampled or left out unless requested. Dropout
rates are not copied. A library is imported only for a source that needs it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vitkernels.layers import SwiGLU, SwiGLUPacked
from vitkernels.layers.records import activation_name
from vitkernels.models.weights import FILES, State, read_config, read_weights

Config = dict[str, object]

_FEATURES_ONLY = "take its tokens with features_only=True"
_ATTENTION_POOL = f"it pools by attention (SigLIP's head), which the model here does not; {_FEATURES_ONLY}"
_HEADS = ("head.", "head_dist.", "fc_norm.", "attn_pool.", "pre_logits.")


def check_state(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str) -> None:
    """Raise one ValueError that lists all missing, unexpected and wrongly shaped tensors of ``state``."""
    problems = []
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    shapes = [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & state.keys())
        if state[name].shape != wanted[name].shape
    ]
    for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if names:
            problems.append(f"{len(names)} {kind}: {', '.join(names)}")
    if problems:
        hint = "; set_input_size resamples positions" if any(line.startswith("pos_embed") for line in shapes) else ""
        raise ValueError(f"the weights of {source} do not fit, by timm's names: {'; '.join(problems)}{hint}")


def build(cls: type[nn.Module], config: Config, state: State, source: object) -> nn.Module:
    """Make a model of ``cls`` with copies of the weights ``state``, which must fit."""
    model = cls(**config, weight_init="skip", device="meta")
    check_state(state, model.state_dict(), type(source).__name__ if isinstance(source, nn.Module) else str(source))
    model.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()}, assign=True)
    for module in model.modules():
        if hasattr(module, "init_non_persistent_buffers"):  # no state dict holds them
            module.init_non_persistent_buffers()
    return model


def to_timm(model: nn.Module, cls: type[nn.Module], **config: object) -> nn.Module:
    """Make a model of timm's ``cls`` with copies of the weights of ``model``."""
    like = next(model.parameters())
    made = cls(**config).to(like.device, like.dtype)
    made.load_state_dict(model.state_dict())
    return made.train(model.training)


def timm_model(
    source: nn.Module | str | Path, architecture: str | None, pretrained: bool, args: Config
) -> tuple[nn.Module, State]:
    """Return a model of timm and weights for it; with the weights of a file, those of the model are never made."""
    if isinstance(source, nn.Module):
        _refuse_arguments(architecture, args)
        return source, source.state_dict()
    from timm import create_model

    path = Path(source)
    if path.exists():
        architecture, args = _timm_architecture(path, architecture, args)
        state = read_weights(path)
        with torch.device("meta"):
            return create_model(architecture, pretrained=False, **args), state
    model = create_model(str(source), pretrained=pretrained, **args)
    return model, model.state_dict()


def timm_source(
    source: nn.Module | str | Path, architecture: str | None, pretrained: bool, features_only: bool, args: Config
) -> tuple[Config, State]:
    """Return arguments and weights for :meth:`VisionTransformer.from_timm`."""
    model, state = timm_model(source, architecture, pretrained, args)
    config = timm_config(model)
    if features_only:
        return without_head(config, state)
    if config["global_pool"] == "map":
        raise NotImplementedError(_ATTENTION_POOL)
    return config, state


def torchvision_source(
    source: nn.Module | str | Path, architecture: str | None, weights: str | None, features_only: bool, args: Config
) -> tuple[Config, State]:
    """Return arguments and weights for :meth:`VisionTransformer.from_torchvision`."""
    state = None
    if isinstance(source, nn.Module):
        _refuse_arguments(architecture, args)
    else:
        from torchvision.models import get_model

        path = Path(source)
        if path.exists():
            if architecture is None:
                raise ValueError(f"{path} says nothing of its architecture; give architecture='vit_b_16', say")
            state = read_weights(path)
            source = get_model(architecture, weights=None, **args)
        else:
            source = get_model(str(source), weights=weights, **args)
    config = torchvision_config(source)
    state = _renamed(source.state_dict() if state is None else state, _TORCHVISION)
    return without_head(config, state) if features_only else (config, state)


def hf_source(source: nn.Module | str | Path, features_only: bool) -> tuple[Config, State]:
    """Return arguments and weights for :meth:`VisionTransformer.from_hf`."""
    if isinstance(source, nn.Module):
        config, state = source.config.to_dict(), source.state_dict()
    else:
        folder = Path(source) if Path(source).exists() else _downloaded(str(source))
        config, state = read_config(folder / "config.json"), read_weights(folder)
    try:
        made = hf_config(config)
    except (LookupError, TypeError, AttributeError) as error:
        where = f"the config of {type(source).__name__}" if isinstance(source, nn.Module) else folder / "config.json"
        raise ValueError(f"{where} is not complete, or holds other types: {type(error).__name__}: {error}") from error
    renamed = hf_state(state)
    if made["no_embed_class"] and {"cls_token", "pos_embed"} <= renamed.keys():
        renamed = _merge_class_position(renamed)
    if features_only:
        return without_head(made, renamed)
    classifies = "classifier.weight" in state
    if "head_dist.weight" in renamed:
        raise NotImplementedError(f"its two heads are averaged (DeiT with a teacher); {_FEATURES_ONLY}")
    if classifies and _HF_KINDS[config["model_type"]] in ("dinov2", "clip"):
        raise NotImplementedError(
            f"its head takes the mean of the patches, with the class token or before the last norm; {_FEATURES_ONLY}"
        )
    if not made["class_token"]:
        if classifies:
            made["global_pool"] = "avg"
            renamed = {name: tensor for name, tensor in renamed.items() if not name.startswith("attn_pool.")}
        elif "attn_pool.probe" in renamed:
            raise NotImplementedError(_ATTENTION_POOL)
    if "head.weight" in renamed:
        made["num_classes"] = renamed["head.weight"].shape[0]
    if "pre_logits.fc.weight" in renamed:
        if config.get("pooler_act", "tanh") != "tanh":
            raise NotImplementedError(f"pooler_act is {config['pooler_act']!r}; expected 'tanh'")
        made["representation_size"] = renamed["pre_logits.fc.weight"].shape[0]
    return made, renamed


def _refuse_arguments(architecture: str | None, args: Config) -> None:
    if architecture or args:
        names = ", ".join([*args] or ["architecture"])
        raise TypeError(f"a model is taken as it is; {names} can be given with a name or a path alone")


def _timm_architecture(path: Path, architecture: str | None, args: Config) -> tuple[str, Config]:
    """Return the timm architecture of the weights at ``path`` and its arguments.

    They come from the config.json in a directory that timm wrote, unless ``architecture`` is given.
    """
    if architecture is None and (path / "config.json").exists():
        config = read_config(path / "config.json")
        more = config.get("model_args") or {}
        if not isinstance(config.get("architecture"), str) or not isinstance(more, dict):
            raise ValueError(f"{path / 'config.json'} names no architecture of timm, or its model_args are no object")
        own = {name: config[name] for name in ("num_classes", "global_pool") if name in config}
        return config["architecture"], {**own, **more, **args}
    if architecture is None:
        raise ValueError(f"{path} says nothing of its architecture; give architecture='vit_base_patch16_224', say")
    return architecture, args


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, allow_patterns=["config.json", "model*.safetensors", FILES[1]]))
    if not any(folder.glob("*.safetensors")):
        folder = Path(snapshot_download(name, allow_patterns=["config.json", FILES[2]]))
    return folder


def without_head(config: Config, state: State, fc_norm: str = "fc_norm") -> tuple[Config, State]:
    """Leave out everything after the last norm over tokens, so that the model returns all tokens.

    ``fc_norm`` names the argument that puts the norm behind the pool.
    """
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(_HEADS)}
    more = {"num_classes": 0, "global_pool": "", fc_norm: False}
    if config.get(fc_norm):  # its norm comes after the pool
        more["final_norm"] = False
    return {name: value for name, value in config.items() if name != "representation_size"} | more, kept


def beit_config(model: nn.Module) -> Config:
    """Return the arguments that make a model like ``model``, a ``Beit`` of timm or of this package.

    Raises:
        NotImplementedError: It has a part that this package does not support.
    """
    config, block = _beit_like(model, "Beit", "SwiGLU"), model.blocks[0]
    return config | {
        "use_rel_pos_bias": block.attn.relative_position_bias_table is not None,
        "use_shared_rel_pos_bias": model.rel_pos_bias is not None,
    }


def eva_config(model: nn.Module) -> Config:
    """Return the arguments that make a model like ``model``, an ``Eva`` of timm or of this package.

    Raises:
        NotImplementedError: It has a part that this package does not support.
    """
    config = _beit_like(model, "Eva", "SwiGLU", "SwiGLUPacked", "GluMlp")
    if hasattr(model, "use_rot_pos_emb"):  # ours
        return config | {
            name: getattr(model, name) for name in ("use_rot_pos_emb", "rope_temperature", "ref_feat_shape")
        }
    for name, module in model.named_modules():
        if name.startswith("blocks.") and name.count(".") == 1:
            _expect(module, name, "EvaBlock")
            _expect(module.attn, f"{name}.attn", "EvaAttention")
            for part in ("qkv", "q_norm", "k_norm", "norm"):
                _expect(getattr(module.attn, part), f"{name}.attn.{part}", "Linear" if part == "qkv" else "Identity")
    _expect(model.norm_pre, "norm_pre", "Identity")
    if model.num_prefix_tokens != 1 or model.cls_token is None or model.no_embed_class or model.patch_drop is not None:
        raise NotImplementedError("it has no class token with a position, more tokens beside it, or patch dropout")
    rope = model.rope
    if rope is None:
        return config | {"use_rot_pos_emb": False}
    _expect(rope, "rope", "RotaryEmbeddingCat")
    wanted = {"in_pixels": False, "grid_offset": 0.0, "grid_indexing": "ij", "rotate_half": False}
    for name, value in wanted.items():
        if getattr(rope, name, value) != value:
            raise NotImplementedError(f"rope.{name} is {getattr(rope, name)!r}; expected {value!r}")
    if rope.feat_shape is None:
        raise NotImplementedError("it takes images of any size; expected one size")
    scaled = None if rope.ref_feat_shape is None else tuple(rope.ref_feat_shape)
    return config | {"use_rot_pos_emb": True, "rope_temperature": rope.temperature, "ref_feat_shape": scaled}


def _beit_like(model: nn.Module, kind: str, *gated: str) -> Config:
    """Return the arguments that :func:`beit_config` and :func:`eva_config` have in common."""
    _expect(model, "the model", kind)
    _expect(model.patch_embed, "patch_embed", "PatchEmbed")
    block = model.blocks[0]
    for name, module in model.named_modules():
        if name.endswith(".mlp"):
            _expect(module, name, type(block.mlp).__name__)
    _expect(block.mlp, "blocks.0.mlp", "Mlp", *gated)
    eps = _norms_eps(model)
    is_gated = type(block.mlp).__name__ != "Mlp"
    if _activation(block.mlp.act) != ("silu" if is_gated else "gelu"):
        raise NotImplementedError(f"its activation is {block.mlp.act}; expected a SiLU in SwiGLU, else a GELU")
    has_norm, has_fc_norm = (isinstance(norm, nn.LayerNorm) for norm in (model.norm, model.fc_norm))
    return {
        "img_size": tuple(model.patch_embed.img_size),
        "patch_size": tuple(model.patch_embed.patch_size),
        "in_chans": model.patch_embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "qkv_bias": block.attn.q_bias is not None,
        "mlp_ratio": mlp_ratio(model.embed_dim, block.mlp.fc2.in_features),
        "swiglu_mlp": is_gated,
        "scale_mlp": isinstance(block.mlp.norm, nn.LayerNorm),
        "norm_layer": functools.partial(nn.LayerNorm, eps=eps),
        "init_values": None if block.gamma_1 is None else 1e-5,
        "use_abs_pos_emb": model.pos_embed is not None,
        "use_fc_norm": has_fc_norm,
        "final_norm": has_norm or has_fc_norm,
    }


def _norms_eps(model: nn.Module) -> float:
    """Return the eps of all norms of ``model`` outside of an attention pool.

    Raises:
        NotImplementedError: One is no LayerNorm, or they have several eps.
    """
    found = set()
    for name, module in model.named_modules():
        if "Norm" in type(module).__name__ and "attn_pool" not in name:
            _expect(module, name, "LayerNorm")
            found.add(module.eps)
    if len(found) > 1:
        raise NotImplementedError(f"its norms have several eps: {sorted(found)}")
    return found.pop()


def timm_config(model: nn.Module) -> Config:
    """Return the arguments that make a model like ``model``, a ``VisionTransformer`` of timm or of this package.

    Raises:
        NotImplementedError: It has a part that this package does not support.
    """
    _expect(model, "the model", "VisionTransformer")
    _expect(model.patch_embed, "patch_embed", "PatchEmbed")
    _expect(getattr(model.patch_embed, "norm", None), "patch_embed.norm", "Identity", "NoneType")
    if getattr(model.patch_embed, "dynamic_img_pad", False):
        raise NotImplementedError("patch_embed pads images (dynamic_img_pad), which there is none of here")
    for i, block in enumerate(model.blocks):
        _expect(block, f"blocks.{i}", "Block")
        _expect(block.attn, f"blocks.{i}.attn", "Attention")
        _expect(block.mlp, f"blocks.{i}.mlp", *({*_MLPS} if i == 0 else {type(model.blocks[0].mlp).__name__}))
    block, conv = model.blocks[0], model.patch_embed.proj
    mlp, kind = block.mlp, _MLPS[type(block.mlp).__name__]
    hidden = mlp.fc2.in_features if kind is SwiGLU else mlp.fc1.out_features
    has_norm, has_fc_norm = (isinstance(norm, nn.LayerNorm) for norm in (model.norm, model.fc_norm))
    return {
        "img_size": tuple(model.patch_embed.img_size or (224, 224)),
        "patch_size": tuple(model.patch_embed.patch_size),
        "in_chans": conv.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": mlp_ratio(model.embed_dim, hidden),
        "mlp_layer": functools.partial(SwiGLUPacked, gate_last=mlp.gate_last) if kind is SwiGLUPacked else kind,
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "proj_bias": block.attn.proj.bias is not None,
        "init_values": None if isinstance(block.ls1, nn.Identity) else 1e-5,
        "class_token": model.cls_token is not None,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": model.no_embed_class,
        "reg_tokens": 0 if model.reg_token is None else model.reg_token.shape[1],
        "pre_norm": isinstance(model.norm_pre, nn.LayerNorm),
        "final_norm": has_norm or has_fc_norm,
        "fc_norm": has_fc_norm,
        "pool_include_prefix": getattr(model, "pool_include_prefix", False),
        "dynamic_img_size": model.dynamic_img_size,
        "norm_layer": functools.partial(nn.LayerNorm, eps=_norms_eps(model)),
        "act_layer": _activation(mlp.act),
    }


def timm_mlp_layer(mlp_layer: object) -> object:
    """Return timm's layer of the same keys in place of the one that :func:`timm_config` names."""
    from timm import layers

    if mlp_layer is None:
        return layers.Mlp
    return layers.SwiGLU if mlp_layer is SwiGLU else functools.partial(layers.GluMlp, **mlp_layer.keywords)


def swin_config(model: nn.Module, kind: str) -> Config:
    """Return the arguments that make a model like ``model``, a ``kind`` of timm or of this package.

    Args:
        model: The model.
        kind: ``"SwinTransformer"`` or ``"SwinTransformerV2"``.

    Raises:
        NotImplementedError: It has a part that this package does not support.
    """
    _expect(model, "the model", kind)
    _expect(model.patch_embed, "patch_embed", "PatchEmbed")
    stages = [(stage, stage.blocks[0]) for stage in model.layers]
    for name, block in model.named_modules():
        if name.endswith(".mlp"):
            _expect(block, name, "Mlp")
    pool = getattr(model.head, "global_pool", None)
    windows = [block.window_size for _, block in stages]
    if getattr(model, "_ref_grid_size", None) == tuple(model.patch_embed.grid_size):
        windows = model._ref_window_sizes  # not yet cut to the images of this size
    config = {
        "img_size": tuple(model.patch_embed.img_size),
        "patch_size": tuple(model.patch_embed.patch_size),
        "in_chans": model.patch_embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool if pool is None else pool.pool_type,
        "embed_dim": model.patch_embed.proj.out_channels,
        "depths": tuple(len(stage.blocks) for stage, _ in stages),
        "num_heads": tuple(block.attn.num_heads for _, block in stages),
        "window_size": tuple(map(tuple, windows)),
        "always_partition": stages[0][1].always_partition,
        "strict_img_size": model.patch_embed.strict_img_size,
        "drop_path_rate": 0.0,
        "norm_layer": functools.partial(nn.LayerNorm, eps=_norms_eps(model)),
    }
    widths = [block.attn.proj.out_features for _, block in stages]
    ratios = tuple(mlp_ratio(w, b.mlp.fc1.out_features) for w, (_, b) in zip(widths, stages, strict=True))
    attn, act = stages[0][1].attn, _activation(stages[0][1].mlp.act)
    if kind == "SwinTransformerV2":
        if len({*ratios}) > 1:
            raise NotImplementedError(f"its MLPs have several ratios: {ratios}")
        return config | {
            "mlp_ratio": ratios[0],
            "qkv_bias": attn.q_bias is not None,
            "act_layer": act,
            "pretrained_window_sizes": tuple(tuple(block.attn.pretrained_window_size) for _, block in stages),
        }
    if act != "gelu":
        raise NotImplementedError(f"its activation is {act}; expected gelu")
    head_dims = tuple(block.attn.qkv.out_features // (3 * block.attn.num_heads) for _, block in stages)
    return config | {"mlp_ratio": ratios, "qkv_bias": attn.qkv.bias is not None, "head_dim": head_dims}


def torchvision_config(model: nn.Module) -> Config:
    """Return the arguments that make a model like torchvision's ``VisionTransformer``.

    Raises:
        NotImplementedError: It has a convolutional stem.
    """
    _expect(model, "the model", "VisionTransformer")
    _expect(model.conv_proj, "conv_proj", "Conv2d")
    block = model.encoder.layers[0]
    return {
        "img_size": model.image_size,
        "patch_size": model.patch_size,
        "num_classes": model.heads.head.out_features,
        "embed_dim": model.hidden_dim,
        "depth": len(model.encoder.layers),
        "num_heads": block.num_heads,
        "mlp_ratio": mlp_ratio(model.hidden_dim, model.mlp_dim),
        "representation_size": model.representation_size,
        "norm_layer": functools.partial(nn.LayerNorm, eps=block.ln_1.eps),
        "act_layer": _activation(block.mlp[1]),
    }


def hf_config(config: Mapping) -> Config:
    """Return the arguments, except those of the head, that make a model like the one of a transformers config.

    Args:
        config: A config as a dictionary, of ViT, DeiT, DINOv2 with or without registers, SigLIP or CLIP (vision tower,
            or both towers).

    Raises:
        NotImplementedError: The kind of model, activation or MLP is not supported.
    """
    kind = config.get("model_type")
    if kind not in _HF_KINDS:
        raise NotImplementedError(f"model_type is {kind!r}; expected one of {', '.join(_HF_KINDS)}")
    config = config.get("vision_config", config)
    if config.get("use_swiglu_ffn"):
        raise NotImplementedError("its MLPs are SwiGLU (use_swiglu_ffn); the model here has plain ones")
    activation = config.get("hidden_act", "gelu")
    if activation not in _HF_ACTIVATIONS:
        raise NotImplementedError(f"hidden_act is {activation!r}; expected one of {', '.join(_HF_ACTIVATIONS)}")
    family, width = _HF_KINDS[kind], config["hidden_size"]
    hidden = int(width * config["mlp_ratio"]) if family == "dinov2" else config["intermediate_size"]
    registers = 1 if family == "deit" else config.get("num_register_tokens", 0)
    return {
        "img_size": config["image_size"],
        "patch_size": config["patch_size"],
        "in_chans": config.get("num_channels", 3),
        "num_classes": 0,
        "global_pool": "" if family == "siglip" else "token",
        "embed_dim": width,
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_ratio": mlp_ratio(width, hidden),
        "qkv_bias": config.get("qkv_bias", True),
        "init_values": 1e-5 if family == "dinov2" else None,
        "class_token": family != "siglip",
        "no_embed_class": family == "dinov2" and registers > 0,
        "reg_tokens": registers,
        "pre_norm": family == "clip",
        "fc_norm": False,
        "norm_layer": functools.partial(nn.LayerNorm, eps=config["layer_norm_eps"]),
        "act_layer": _HF_ACTIVATIONS[activation],
    }


def hf_state(state: Mapping[str, Tensor]) -> State:
    """Rename weights of transformers 4 and 5 to timm's names; separate q, k and v become one qkv.

    Mask tokens, which only training needs, and weights of a text tower are left out.
    """
    state = {name: tensor for name, tensor in state.items() if not re.search(_HF_ELSEWHERE, name)}
    renamed = _renamed(state, _HF)
    for name in [name for name in renamed if ".attn.q." in name]:
        parts = [renamed.pop(name.replace(".attn.q.", f".attn.{x}."), None) for x in "qkv"]
        if None not in parts:
            renamed[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    for name in ("cls_token", "pos_embed"):  # (C,) in CLIP, (N, C) as the weight of an Embedding
        if name in renamed:
            renamed[name] = renamed[name].reshape(1, -1, renamed[name].shape[-1])
    if "visual_projection.weight" in state:  # which has no bias
        renamed["head.bias"] = renamed["head.weight"].new_zeros(renamed["head.weight"].shape[0])
    return renamed


def _merge_class_position(state: State) -> State:
    """Add the class token's position to the token itself, for models with positions only for patches."""
    cls_token, pos_embed = state["cls_token"], state["pos_embed"]
    return {**state, "cls_token": cls_token + pos_embed[:, :1], "pos_embed": pos_embed[:, 1:]}


def mlp_ratio(width: int, hidden: int) -> float:
    """Return a ratio such that ``int(width * ratio) == hidden``, which ``hidden / width`` is not for 4304 / 1152."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _activation(act: nn.Module) -> str:
    name = activation_name(act)
    if name is None:
        raise NotImplementedError(f"the activation is a {type(act).__name__}, which there is none of here")
    return name


def _expect(module: object, where: str, *classes: str) -> None:
    name = type(module).__name__
    if name not in classes:
        raise NotImplementedError(f"{where} is a {name}; expected a {' or '.join(classes)}")


def _renamed(state: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]) -> State:
    renamed = {}
    for name, tensor in state.items():
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        if new in renamed:
            raise ValueError(f"two weights are {new} by timm's names; one of them is {name}")
        renamed[new] = tensor
    return renamed


# By the names of timm's MLPs and of this package's: the mlp_layer that makes one.
_MLPS = {"Mlp": None, "SwiGLU": SwiGLU, "GluMlp": SwiGLUPacked, "SwiGLUPacked": SwiGLUPacked}

_TORCHVISION = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
    (r"^heads\.pre_logits\.", "pre_logits.fc."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
)

# Weights of a text tower or for training with masked patches, and CLIP's position_ids, which are 0, 1, 2, ….
_HF_ELSEWHERE = r"^text_model\.|^text_projection\.|^logit_(scale|bias)$|\.?mask_token$|\.position_ids$"
_HF = (
    (r"^((vit|deit|dinov2|dinov2_with_registers|vision_model)\.)+", ""),
    (r"^embeddings\.(cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.(distillation_token|register_tokens)$", "reg_token"),
    (r"^embeddings\.position_embedding(s|\.weight)$", "pos_embed"),
    (r"^embeddings\.(patch_embeddings\.projection|patch_embedding)\.", "patch_embed.proj."),
    (r"^head\.(?=probe|attention|layernorm|mlp)", "attn_pool."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(layernorm|post_layernorm)\.", "norm."),
    (r"^(classifier|cls_classifier|visual_projection)\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
    (r"^pooler\.dense\.", "pre_logits.fc."),
    (r"^(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"^(blocks\.\d+)\.(layernorm_before|layer_norm1)\.", r"\1.norm1."),
    (r"^(blocks\.\d+)\.(layernorm_after|layer_norm2)\.", r"\1.norm2."),
    (r"^(blocks\.\d+)\.layer_scale([12])\.lambda1$", r"\1.ls\2.gamma"),
    (r"^(blocks\.\d+)\.(attention\.attention|attention|self_attn)\.(q|k|v)(uery|ey|alue|_proj)\.", r"\1.attn.\3."),
    (r"^(blocks\.\d+)\.(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)
_HF_KINDS = {
    "vit": "vit",
    "deit": "deit",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "clip": "clip",
    "clip_vision_model": "clip",
}
_HF_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}
