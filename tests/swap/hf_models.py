"""Small models of transformers, made from configurations, with inputs for them."""

from collections.abc import Callable

import pytest
import torch
import transformers
from parity import shake
from torch import Tensor, nn
from transformers.models.vit import modeling_vit

# One size for all, and for the models of timm in test_parity.py: fewer than 16 rows, so that each kernel is compiled
# once. Every path of the originals is there.
VISION = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
TEXT = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 128,
    "vocab_size": 99,
    "max_position_embeddings": 16,
    "projection_dim": 24,
    "eos_token_id": 98,
}
# Releases 4.5x cut the layers of ViT, its like and DINOv2 into other parts.
OLD = not hasattr(modeling_vit, "ViTMLP")
_ATTENTION = {"SelfAttention", "SelfOutput"} if OLD else {"Attention"}
DINOV2_PARTS = _ATTENTION | {"MLP", "Layer", "PatchEmbeddings"}
PARTS = _ATTENTION | {"Layer", "PatchEmbeddings"} | ({"Intermediate", "Output"} if OLD else {"MLP"})
SIGLIP_PARTS = {"Attention", "MLP", "EncoderLayer", "VisionEmbeddings"}


def images(size: int = 32, batch: int = 2) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, size, size)}


def texts() -> dict[str, Tensor]:
    ids = torch.randint(0, 98, (2, 7))
    ids[:, -1] = 98
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0  # padding, so that masks other than the causal one are there too
    return {"input_ids": ids, "attention_mask": mask}


def packed_patches() -> dict[str, Tensor]:
    """SigLIP2's images: patches of two sizes of image, padded to the longer."""
    mask = torch.ones(2, 6, dtype=torch.int32)
    mask[1, 4:] = 0
    return {
        "pixel_values": torch.randn(2, 6, 3 * 16 * 16),
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[2, 3], [2, 2]]),
    }


def llava(**more) -> nn.Module:
    text = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=99
    )
    vision = transformers.CLIPVisionConfig(**VISION | more)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=98)
    return transformers.LlavaForConditionalGeneration(config)


def paligemma() -> nn.Module:
    text = transformers.GemmaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=99,
    )  # fmt: skip
    vision = transformers.SiglipVisionConfig(**VISION)
    config = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=98, projection_dim=32
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def images_in_texts() -> dict[str, Tensor]:
    ids = torch.tensor([[1, *[98] * 4, 5, 6], [2, *[98] * 4, 7, 8]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images()}


def clip_pair() -> nn.Module:
    config = transformers.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=24)
    return transformers.CLIPModel(config)


def siglip_pair() -> nn.Module:
    text = TEXT | {"projection_size": 32}
    return transformers.SiglipModel(transformers.SiglipConfig(vision_config=VISION, text_config=text))


def vit(**more) -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION | more))


def dinov2(**more) -> nn.Module:
    return transformers.Dinov2Model(transformers.Dinov2Config(**VISION | {"layerscale_value": 0.7} | more))


def dinov3(**more) -> nn.Module:
    if not hasattr(transformers, "DINOv3ViTModel"):
        pytest.skip(f"transformers {transformers.__version__} has no DINOv3: it came with 4.56")
    options = VISION | {"num_register_tokens": 2, "layerscale_value": 0.7} | more
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**options))


def beit(**more) -> nn.Module:
    """With a bias by relative position in each layer, unless told otherwise."""
    if OLD:
        pytest.skip(f"transformers {transformers.__version__} cuts BEiT's layers into other parts")
    options = VISION | {"use_relative_position_bias": True, "layer_scale_init_value": 0.5} | more
    return transformers.BeitForImageClassification(transformers.BeitConfig(**options))


def data2vec(**more) -> nn.Module:
    """With a bias in each layer and a shared one."""
    options = {"use_relative_position_bias": True, "use_shared_relative_position_bias": True}
    options |= VISION | {"layer_scale_init_value": 0.5} | more
    return transformers.Data2VecVisionForImageClassification(transformers.Data2VecVisionConfig(**options))


# By name: what makes the model, its inputs, and the ends of the names of the classes that must be swapped.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], set[str]]] = {
    "vit": (lambda: vit(num_hidden_layers=2), images, PARTS),
    "deit": (
        lambda: transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**VISION)), images, PARTS,
    ),
    "vit_mae": (
        lambda: transformers.ViTMAEForPreTraining(
            transformers.ViTMAEConfig(
                **VISION, decoder_hidden_size=32, decoder_num_attention_heads=2, decoder_num_hidden_layers=1,
                decoder_intermediate_size=128,
            )
        ),
        lambda: images() | {"noise": torch.rand(2, 4)},
        PARTS,
    ),
    "dinov2": (dinov2, images, DINOV2_PARTS),
    "dinov2, swiglu": (
        lambda: dinov2(use_swiglu_ffn=True), images, DINOV2_PARTS - {"MLP"} | {"SwiGLUFFN"},
    ),
    "dinov2, registers": (
        lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**VISION, num_register_tokens=2, layerscale_value=0.7)
        ),
        images,
        DINOV2_PARTS,
    ),
    "dinov2, registers, swiglu": (
        lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**VISION, num_register_tokens=2, use_swiglu_ffn=True)
        ),
        images,
        DINOV2_PARTS - {"MLP"} | {"SwiGLUFFN"},
    ),
    "dinov3": (dinov3, images, {"Attention", "MLP", "Layer", "Embeddings"}),
    "dinov3, gated": (
        lambda: dinov3(use_gated_mlp=True, hidden_act="silu"),
        images,
        {"Attention", "GatedMLP", "Layer", "Embeddings"},
    ),
    "beit": (beit, lambda: images(48), {"Attention", "MLP", "Layer", "PatchEmbeddings"}),
    "beit, shared": (
        lambda: beit(use_relative_position_bias=False, use_shared_relative_position_bias=True), images,
        {"Attention", "MLP", "Layer", "PatchEmbeddings"},
    ),
    "data2vec": (
        data2vec, lambda: images(48),
        # Releases 4.5x pass head masks through its layers and attention, which stay as they are.
        {"SelfOutput", "PatchEmbeddings"} | (set() if OLD else {"SdpaSelfAttention", "VisionLayer"}),
    ),
    "siglip": (
        lambda: transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(**VISION | {"image_size": 38})  # as 384 by patches of 14
        ),
        lambda: images(38),
        SIGLIP_PARTS,
    ),
    "siglip2": (
        lambda: transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**VISION, num_patches=16)),
        packed_patches,
        SIGLIP_PARTS - {"VisionEmbeddings"},
    ),
    "clip": (
        lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION, projection_dim=24)),
        images,
        SIGLIP_PARTS,
    ),
    "clip text": (lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)), texts, set()),
    "clip pair": (clip_pair, lambda: images() | texts(), SIGLIP_PARTS),
    "siglip pair": (siglip_pair, lambda: images() | texts(), SIGLIP_PARTS),
    "llava": (llava, images_in_texts, SIGLIP_PARTS),
    "paligemma": (
        paligemma, lambda: images_in_texts() | {"token_type_ids": torch.zeros(2, 7, dtype=torch.long)}, SIGLIP_PARTS,
    ),
}  # fmt: skip


def layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model, wherever its release keeps them."""
    ends = ("ViTLayer", "Dinov2Layer", "EncoderLayer")
    return [module for module in model.modules() if type(module).__name__.endswith(ends)]


def attention(layer: nn.Module) -> nn.Module:
    """The module of a ViT's layer that attends."""
    return layer.attention.attention if OLD else layer.attention


def path_of(module: nn.Module, model: nn.Module) -> str:
    return next(path for path, other in model.named_modules() if other is module)


def build(name: str) -> nn.Module:
    return shake(MODELS[name][0]()).eval()


def inputs_of(name: str, like: Tensor | None = None) -> dict[str, Tensor]:
    """Fresh inputs for a model, on the device and in the dtype of ``like``."""
    inputs = MODELS[name][1]()
    if like is None:
        return inputs
    return {k: x.to(like.device, like.dtype if x.is_floating_point() else x.dtype) for k, x in inputs.items()}


def tensors(outputs: dict) -> dict[str, Tensor]:
    """The floating-point outputs of a model, of models inside it too."""
    found = {}
    for name, value in outputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            found[name] = value
        elif isinstance(value, dict):
            found |= {f"{name}.{inner}": t for inner, t in tensors(value).items()}
        elif isinstance(value, tuple):
            found |= {f"{name}.{i}": t for i, t in enumerate(value) if isinstance(t, Tensor)}
    return found
