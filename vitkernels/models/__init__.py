"""Networks made of :mod:`vitkernels.layers`."""

from vitkernels.models.beit import Beit
from vitkernels.models.eva import Eva
from vitkernels.models.swin_transformer import SwinTransformer, SwinTransformerV2
from vitkernels.models.vision_transformer import VisionTransformer

__all__ = ["Beit", "Eva", "SwinTransformer", "SwinTransformerV2", "VisionTransformer"]
