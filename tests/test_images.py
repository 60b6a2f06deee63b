"""How classify opens images: every mode of Pillow, transparency, broken bytes.

EXIF is a hostile input: tests/hostile/test_hostile_exif.py.
"""

import pytest
import torch

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image", reason="classify reads images with Pillow")
pytest.importorskip("matplotlib", reason="classify draws with matplotlib")

from vitkernels.tools.console import UserError  # noqa: E402
from vitkernels.tools.demo.classify import open_image  # noqa: E402

WHITE = (255, 255, 255)


def to_rgb(image):
    from vitkernels.tools.demo.image import to_rgb

    return to_rgb(image)


def mean(image) -> float:
    return float(np.asarray(image, dtype=np.float64).mean())


def test_16_bit_grey_is_not_turned_white(tmp_path):
    """A ramp from black to white has the mean 127.5; cut off at 255 it had 254.5."""
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    seen = open_image(tmp_path / "ramp.png")
    assert seen.mode == "RGB"
    assert abs(mean(seen) - 127.5) < 0.01
    wanted = np.rint(ramp / 257)[..., None].repeat(3, -1)
    assert (np.asarray(seen) == wanted).all()
    dark = np.full((2, 2), 514, dtype=np.uint16)
    Image.fromarray(dark).save(tmp_path / "dark.png")
    assert mean(open_image(tmp_path / "dark.png")) == 2.0, "a dark picture stays dark"


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N", "I", "F"])
def test_integer_and_float_modes(mode):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    order = {"I;16B": ">u2", "I;16L": "<u2", "I;16": "<u2", "I": "int32", "F": "float32"}.get(mode, "=u2")
    image = Image.frombytes(mode, (256, 256), ramp.astype(order).tobytes())
    assert abs(mean(to_rgb(image)) - 127.5) < 0.01


@pytest.mark.parametrize("mode", ["I", "F"])
def test_white_is_told_by_the_values_where_the_mode_does_not(mode):
    """Pillow's own conversion from 8 bits leaves 0 to 255; floating-point pictures also go from 0 to 1."""
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert mean(to_rgb(ramp.convert(mode))) == 127.5
    if mode == "F":
        assert abs(mean(to_rgb(Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32)[None]))) - 127.5) < 0.01
    for values in ([-1, 5], [0, 65536], [0, float("nan")] if mode == "F" else [0, 2**31 - 1]):
        image = Image.fromarray(np.array([values], dtype=np.float32 if mode == "F" else np.int32))
        with pytest.raises(ValueError, match=f"mode {mode} holds .* expected 0 to"):
            to_rgb(image)


COLOURS = {"1": WHITE, "L": (90,) * 3, "P": (204, 102, 51), "RGB": (200, 100, 50), "RGBA": (200, 100, 50)}
COLOURS |= {"RGBX": (200, 100, 50), "RGBa": (200, 100, 50), "CMYK": (200, 100, 50), "YCbCr": (200, 100, 50)}
COLOURS |= {"HSV": (200, 100, 50), "LAB": (200, 100, 50), "LA": (90,) * 3, "La": (90,) * 3, "PA": (90,) * 3}


@pytest.mark.parametrize("mode", COLOURS)
def test_modes_of_8_bits(mode):
    image = Image.new("RGB", (4, 3), COLOURS[mode])
    if mode == "LAB":
        profiles = pytest.importorskip("PIL.ImageCms")
        image = profiles.profileToProfile(
            image, profiles.createProfile("sRGB"), profiles.createProfile("LAB"), outputMode="LAB"
        )
    else:
        through = {"RGBa": "RGBA", "La": "LA", "PA": "LA", "LA": "L"}.get(mode)
        image = (image.convert(through) if through else image).convert(mode)
    assert image.mode == mode
    seen = to_rgb(image)
    assert (seen.mode, seen.size) == ("RGB", (4, 3))
    assert np.abs(np.asarray(seen, dtype=int) - COLOURS[mode]).max() <= 3


def test_cmyk_jpeg(tmp_path):
    Image.new("RGB", (16, 16), (200, 100, 50)).convert("CMYK").save(tmp_path / "print.jpg")
    seen = np.asarray(open_image(tmp_path / "print.jpg"), dtype=int)
    assert np.abs(seen - (200, 100, 50)).max() <= 4


def cut_out(mode: str, colour: int):
    """A disc of one grey on a transparent background, as ``mode`` holds it, whose hidden pixels are black."""
    y, x = np.mgrid[:32, :32] - 15.5
    disc = (x**2 + y**2 < 100).astype(np.uint8)
    la = Image.merge("LA", [Image.fromarray(disc * colour), Image.fromarray(disc * 255)])
    if mode in ("LA", "RGBA"):
        return la.convert(mode), disc
    if mode in ("La", "RGBa"):
        return la.convert(mode if mode == "La" else "RGBA").convert(mode), disc
    grey = Image.fromarray(np.where(disc, colour, 7).astype(np.uint8))  # 7 is what stands for transparent
    if mode == "PA":
        grey = grey.convert("P")
        grey.putalpha(Image.fromarray(disc * 255))
        return grey, disc
    if mode == "I;16":
        grey = Image.fromarray(np.where(disc, colour * 257, 7).astype(np.uint16))
    grey = {"P": lambda: grey.convert("P"), "RGB": lambda: grey.convert("RGB")}.get(mode, lambda: grey)()
    grey.info["transparency"] = (7, 7, 7) if mode == "RGB" else grey.getpixel((0, 0)) if mode == "P" else 7
    return grey, disc


@pytest.mark.parametrize("colour", [0, 60, 128, 255])
@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa", "PA", "P", "L", "RGB", "I;16"])
def test_a_transparent_background_does_not_swallow_the_subject(mode, colour):
    image, disc = cut_out(mode, colour)
    assert image.mode == mode
    seen = np.asarray(to_rgb(image), dtype=int)
    assert np.abs(seen[disc == 1] - colour).max() <= 1
    background = seen[disc == 0]
    assert (background == (0 if colour == 255 else 255)).all(), "white, but black behind what is nearly white"


def test_transparent_files(tmp_path):
    """As a PNG and as a WebP; half transparent is half of each; an alpha of nothing but 255 changes nothing."""
    image, disc = cut_out("RGBA", 0)
    for suffix in ("png", "webp"):
        image.save(tmp_path / f"cut.{suffix}", lossless=True)
        seen = np.asarray(open_image(tmp_path / f"cut.{suffix}"))
        assert (seen[disc == 1] == 0).all()
        assert (seen[disc == 0] == 255).all()
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    half.save(tmp_path / "half.png")
    assert open_image(tmp_path / "half.png").getpixel((0, 0)) == (127, 127, 127)
    assert to_rgb(Image.new("RGBA", (4, 4), (250, 250, 250, 255))).getpixel((0, 0)) == (250, 250, 250)
    assert to_rgb(Image.new("RGBA", (4, 4), (9, 9, 9, 0))).getpixel((0, 0)) == WHITE, "there is no subject"


def test_broken_bytes_are_one_line(tmp_path):
    """Whatever a flipped byte makes of a file: an image, or a UserError of one line."""
    Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)).save(tmp_path / "whole.png")
    whole, path = (tmp_path / "whole.png").read_bytes(), tmp_path / "broken.png"
    draw, said = torch.Generator().manual_seed(0), []
    for _ in range(150):
        data = bytearray(whole)
        at, value = (int(torch.randint(n, (), generator=draw)) for n in (len(data), 256))
        data[at] = value
        path.write_bytes(bytes(data))
        try:
            open_image(path)
        except UserError as error:
            said.append(str(error))
    assert len(said) > 50
    assert all("broken.png" in text and "\n" not in text for text in said)
