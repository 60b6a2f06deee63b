"""Read an image file for the model: upright, opaque, in 8 bits of red, green and blue."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from vitkernels.tools.console import UserError, one_line, warn

if TYPE_CHECKING:
    from PIL import Image

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
ORIENTATION = 0x0112  # EXIF's tag
NEARLY_WHITE = 192  # of 255: a brighter subject gets a black background


def open_image(path: Path) -> Image.Image:
    """Return the image at ``path`` upright and in RGB; :func:`to_rgb` puts a background behind transparent parts.

    An invalid orientation in the EXIF is ignored with a warning.

    Raises:
        UserError: The file is missing, of an unknown format or broken, or has more pixels than Pillow's limit.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about metadata that we do not use
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                image.load()
                turn = _turn(image, path)
                rgb = to_rgb(image)
                return rgb if turn is None else rgb.transpose(turn)
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is no image of a known format; expected {', '.join(IMAGE_FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path} has too many pixels to be opened safely: {one_line(error)}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or one_line(error)}") from error
    except Exception as error:  # on broken files Pillow's readers raise many kinds of errors
        raise UserError(f"{path} is a broken image: {one_line(error)}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert ``image``, of any Pillow mode, to RGB: black becomes 0, white 255.

    Pillow's own conversion clips 16-bit and 32-bit integers and floating-point values at 255; here they are scaled.
    White is 65,535 in 16 bits and in a PNG; else the smallest of 1 (floating-point only), 255 and 65,535 that no value
    exceeds. Transparent parts become white, or black if the subject is nearly white.

    Raises:
        ValueError: A value is below 0, above 65,535 or NaN, so that its brightness is unknown.
    """
    from PIL import Image

    if image.mode[0] in "IF":
        image = _to_8_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":  # Pillow converts La only to LA
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    alpha, rgb = rgba.getchannel("A"), rgba.convert("RGB")
    background = Image.new("RGB", rgb.size, "black" if _brightness(rgb, alpha) > NEARLY_WHITE else "white")
    return Image.composite(rgb, background, alpha)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Convert a one-channel image of wider integers or floating-point values to ``L``, or with transparency ``LA``."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    if image.mode.startswith("I;16") or image.format == "PNG":  # before Pillow 11, a 16-bit PNG has mode I
        whites = [65535]
    else:
        whites = [1, 255, 65535] if image.mode == "F" else [255, 65535]
    white = next((white for white in whites if high <= white), None)
    if white is None or not low >= 0:
        raise ValueError(f"mode {image.mode} holds {low:g} to {high:g}; expected 0 to {' or '.join(map(str, whites))}")
    grey = Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
    transparent = image.info.get("transparency")  # one value, in the image's own bits
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _brightness(rgb: Image.Image, alpha: Image.Image) -> float:
    """Return the mean grey value, 0 to 255, weighted by ``alpha``; 0 if all is transparent."""
    import numpy as np

    weights = np.asarray(alpha, dtype=np.float64)
    return float((np.asarray(rgb.convert("L")) * weights).sum() / max(weights.sum(), 1.0))


def _turn(image: Image.Image, path: Path) -> Image.Transpose | None:
    """Return the transposition that makes ``image`` upright by its EXIF or XMP, or None.

    Pillow's ``exif_transpose`` also rewrites all tags of the EXIF, which fails on values that it cannot encode.
    """
    from PIL import Image
    from PIL.Image import Transpose

    turns = {
        1: None,
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            exif = Image.Exif()
            exif.load(image.info.get("exif"))  # getexif() has a cache from opening, so Pillow would not warn again
            orientation = exif.get(ORIENTATION)
            if orientation is None and not said:  # getexif() also reads XMP, and a PNG's EXIF as text
                orientation = image.getexif().get(ORIENTATION)
        except Exception as error:  # struct.error, Pillow's SyntaxError, …
            orientation, said = None, [warnings.WarningMessage(error, Warning, "", 0)]
    if orientation in turns:
        return turns[orientation]
    if orientation is not None:
        why = f"is {orientation!r}, not 1 to 8"
    elif said:
        why = f"cannot be read ({one_line(said[0].message)})"
    else:
        return None
    warn(f"the orientation in the EXIF of {path} {why}: the image is not rotated")
    return None
