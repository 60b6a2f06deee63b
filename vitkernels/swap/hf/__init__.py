"""Rules for transformers: the layers of its Vision Transformers, and the modules inside them.

transformers repeats the code of each model: DeiT's classes are ViT's under other names. So each kind of module has one
fused forward here, a mixin in front of the original class (``_mixins``; ``_mixins_4`` for kinds of releases 4.5x
only, ``_mixins_data2vec`` for those of data2vec-vision, ``_swin`` for Swin's, ``_sam`` for SAM's and its like,
``_sam2`` for SAM 2's, ``_mobilevit`` for MobileViT's). The tables below list the kinds that a class may be of. A class
gets the first kind that accepts all arguments of its forward. If no kind does, as may happen in a later release, the
class is not swapped.

A fused layer still calls its attention module, except where it runs in windows (Swin, SAM, SAM 2, ViTDet, MobileViT).
So the layer runs fused even if the attention has adapters, or hooks that collect attention weights. Queries, keys and
values stay three products, because packing the three weights would copy them at every step; only windows and a table of
relative positions ask for that.

Imported only if transformers' models are imported.
"""

from __future__ import annotations

import importlib
import inspect
import sys

from torch import nn

from vitkernels.swap._rules import PARAMETERS, Rule, add
from vitkernels.swap.hf import _mixins as new
from vitkernels.swap.hf import _mixins_4 as old
from vitkernels.swap.hf import _mixins_data2vec as data2vec
from vitkernels.swap.hf import _mobilevit as mobilevit
from vitkernels.swap.hf import _sam as sam
from vitkernels.swap.hf import _sam2 as sam2
from vitkernels.swap.hf import _swin as swin
from vitkernels.swap.hf._mixins import IMPLEMENTATIONS

__all__ = ["IMPLEMENTATIONS"]

# The kinds that a class may be of, by its name without the family's prefix.
_VIT = {
    "Attention": (new.ViTAttention,),
    "SelfAttention": (old.SelfAttention, old.TupleSelfAttention),
    "SelfOutput": (old.SelfOutput,),
    "MLP": (new.Mlp,),
    "Intermediate": (old.Intermediate,),
    "Output": (old.Output,),
    "PatchEmbeddings": (new.PatchEmbeddings, old.SizedPatchEmbeddings),
    "Layer": (new.ViTLayer, old.ViTLayer),
}
_DINOV2 = {
    "Attention": (new.ViTAttention,),
    "SelfAttention": (old.SelfAttention, old.TupleSelfAttention),
    "SelfOutput": (old.SelfOutput,),
    "MLP": (new.Mlp, old.Dinov2Mlp),
    "SwiGLUFFN": (new.GatedMlp, old.PackedGatedMlp),
    "PatchEmbeddings": (new.CastingPatchEmbeddings,),
    "Layer": (new.Dinov2Layer, old.Dinov2Layer),
}
_DINOV3 = {
    "Attention": (new.RopeAttention,),
    "MLP": (new.UpDownMlp,),
    "GatedMLP": (new.GatedMlp,),
    "Embeddings": (new.Dinov3Embeddings,),
    "Layer": (new.Dinov2Layer,),
}
_SIGLIP = {
    "Attention": (new.SiglipAttention, old.SiglipAttention),
    "SdpaAttention": (old.SiglipAttention,),
    "MLP": (new.Mlp,),
    "VisionEmbeddings": (new.VisionEmbeddings,),
    "EncoderLayer": (new.CLIPLayer, old.SiglipLayer),
}
_CLIP = {
    "Attention": (new.CLIPAttention, old.CLIPAttention),
    "SdpaAttention": (old.CLIPAttention,),
    "MLP": (new.Mlp,),
    "VisionEmbeddings": (new.ClassVisionEmbeddings,),
    "EncoderLayer": (new.CLIPLayer, old.CLIPLayer),
}
_SWIN = {
    "MLP": (new.Mlp,),
    "Intermediate": (old.Intermediate,),
    "PatchEmbeddings": (swin.PatchEmbeddings,),
    "Layer": (swin.SwinLayer, swin.TupleSwinLayer),
    "PatchMerging": (swin.PatchMerging,),
}
_MASKFORMER = _SWIN | {"Layer": (swin.MaskFormerSwinLayer,)}
_SWINV2 = _SWIN | {"Layer": (swin.Swinv2Layer,), "PatchMerging": (swin.PatchMergingV2,)}
_BEIT = {
    "Attention": (new.ViTAttention,),
    "MLP": (new.Mlp,),
    "PatchEmbeddings": (new.PatchEmbeddings,),
    "Layer": (new.BeitLayer,),
}
_DATA2VEC = {
    "SdpaSelfAttention": (data2vec.SelfAttention,),
    "SelfOutput": (data2vec.SelfOutput,),
    "Intermediate": (old.Intermediate,),
    "Output": (data2vec.Output,),
    "PatchEmbeddings": (data2vec.PatchEmbeddings,),
    "Layer": (data2vec.Layer,),
}
_SAM = {
    "VisionSdpaAttention": (sam.VisionAttention,),
    "MLPBlock": (sam.MlpBlock,),
    "VisionLayer": (sam.VisionLayer, sam.TupleVisionLayer),
}
_EAGER_SAM = {
    "MLPBlock": (sam.MlpBlock,),
    "VisionLayer": (sam.EagerVisionLayer, sam.TupleEagerVisionLayer),
}
_SAM2 = {
    "MultiScaleAttention": (sam2.MultiScaleAttention,),
    "FeedForward": (sam2.FeedForward,),
    "MultiScaleBlock": (sam2.MultiScaleBlock,),
}
_VITDET = {
    "Attention": (sam.VitDetAttention,),
    "Mlp": (sam.VitDetMlp,),
    "Layer": (sam.VitDetLayer,),
}
_MOBILEVIT = {
    "Intermediate": (old.Intermediate,),
    "TransformerLayer": (mobilevit.TransformerLayer,),
    "Layer": (mobilevit.MobileViTLayer,),
}

# The folder in transformers.models (and the model in it), the prefix of the class names, the kinds of the classes, and
# a class that the release must have.
_FAMILIES = (
    ("vit", "ViT", _VIT),
    ("deit", "DeiT", _VIT),
    ("vit_mae", "ViTMAE", _VIT),
    ("dinov2", "Dinov2", _DINOV2),
    ("dinov2_with_registers", "Dinov2WithRegisters", _DINOV2),
    ("dinov3_vit", "DINOv3ViT", _DINOV3),
    ("siglip", "Siglip", _SIGLIP),
    ("siglip2", "Siglip2", _SIGLIP),
    ("clip", "CLIP", _CLIP),
    ("swin", "Swin", _SWIN),
    ("swinv2", "Swinv2", _SWINV2),
    ("donut.donut_swin", "DonutSwin", _SWIN),
    ("maskformer.maskformer_swin", "MaskFormerSwin", _MASKFORMER),
    ("beit", "Beit", _BEIT, "BeitMLP"),
    ("sam", "Sam", _SAM),
    ("sam_hq", "SamHQ", _SAM),
    ("got_ocr2", "GotOcr2", _EAGER_SAM),
    ("slanext", "SLANeXt", _EAGER_SAM),
    ("sam2", "Sam2", _SAM2),
    ("vitdet", "VitDet", _VITDET),
    ("mobilevit", "MobileViT", _MOBILEVIT),
    ("data2vec.data2vec_vision", "Data2VecVision", _DATA2VEC),
)


def _add_family(
    folder: str, prefix: str, kinds: dict[str, tuple[type[new.Kind], ...]], needed: str | None = None
) -> None:
    """Make a fused class for each class of a family that this release has, and register its rule.

    A release that has no class ``needed`` cuts the family's layers into other parts.
    """
    package, _, model = folder.partition(".")
    try:
        modeling = importlib.import_module(f"transformers.models.{package}.modeling_{model or package}")
    except ImportError:  # an older release, without this model
        return
    own = {name: cls for name, cls in vars(modeling).items() if getattr(cls, "__module__", None) == modeling.__name__}
    if needed is None or needed in own:
        _add_classes(__name__, own, prefix, kinds)


def _add_classes(
    module: str, own: dict[str, object], prefix: str, kinds: dict[str, tuple[type[new.Kind], ...]]
) -> None:
    """Make a fused class in ``module`` for each class of ``own`` that is of a kind, and register its rule."""
    classes = {
        own[prefix + end]: _kind_of(own[prefix + end], among) for end, among in kinds.items() if prefix + end in own
    }
    classes = {cls: kind for cls, kind in classes.items() if kind is not None}
    scales, paths = ([cls for name, cls in own.items() if name.endswith(end)] for end in ("LayerScale", "DropPath"))
    PARAMETERS.update(dict.fromkeys(scales, frozenset({"lambda1"})))
    for cls, kind in classes.items():
        parts = {
            name: tuple(c for c, k in classes.items() if issubclass(k, part)) for name, part in kind._parts.items()
        }
        if issubclass(kind, new.Dinov2Layer):
            parts |= {"layer_scale1": scales, "layer_scale2": scales}
        if issubclass(kind, (new.Dinov2Layer, new.BeitLayer)):
            parts |= {"drop_path": (nn.Identity, *paths)}
        parts |= kind._children(own, prefix)
        name = f"Fused{cls.__name__}"
        body = {
            "__module__": module,
            "__doc__": f"transformers' {cls.__name__} on the kernels.",
            "_arguments": tuple(inspect.signature(cls.forward).parameters)[1:],
        }
        fused_cls = type(name, (kind, cls), body)
        options = kind._options | {"bypassed": kind._options["bypassed"] | parts, "products": kind._products}
        fused_cls._rule = Rule(cls, fused_cls, **options)
        vars(sys.modules[module])[name] = fused_cls  # pickle looks for a class there
        add(fused_cls._rule)


def _kind_of(cls: type[nn.Module], kinds: tuple[type[new.Kind], ...]) -> type[new.Kind] | None:
    arguments = set(inspect.signature(cls.forward).parameters) - {"self"}
    return next((kind for kind in kinds if arguments <= kind._takes), None)


for _family in _FAMILIES:
    _add_family(*_family)
