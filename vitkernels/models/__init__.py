"""Networks made of :mod:`vitkernels.layers`."""

from vitkernels.models.vision_transformer import VisionTransformer

__all__ = ["VisionTransformer"]
