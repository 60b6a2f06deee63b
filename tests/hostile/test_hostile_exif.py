"""Hostile input 55: what others wrote into the EXIF of a JPEG, PNG or WebP."""

import struct

import pytest

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image", reason="classify reads images with Pillow")
pytest.importorskip("matplotlib", reason="classify draws with matplotlib")

from vitkernels.tools.demo.classify import open_image  # noqa: E402

hostile = pytest.mark.hostile
ORIENTATION = 0x0112


def tag(number: int, kind: int, count: int, value: bytes) -> tuple:
    return number, kind, count, value


def exif(*tags: tuple) -> bytes:
    """EXIF of these tags, little-endian."""
    at, entries, data = 8 + 2 + 12 * len(tags) + 4, b"", b""
    for number, kind, count, value in tags:
        if len(value) > 4:
            value, data = struct.pack("<I", at + len(data)), data + value
        entries += struct.pack("<HHI", number, kind, count) + value.ljust(4, b"\0")
    return b"Exif\0\0II" + struct.pack("<HIH", 42, 8, len(tags)) + entries + bytes(4) + data


def short(value: int) -> tuple:
    return tag(ORIENTATION, 3, 1, struct.pack("<H", value))


READABLE = {
    "a rational of -1/0": (tag(0x011A, 10, 1, struct.pack("<ii", -1, 0)),),
    "an unsigned rational of 0/0": (tag(0x011A, 5, 1, bytes(8)),),
    "a negative long": (tag(0x0100, 4, 1, struct.pack("<i", -5)), tag(0x8769, 9, 1, struct.pack("<i", -5))),
    "text where a number belongs": (tag(0x011A, 2, 6, b"hello\0"), tag(0x0100, 2, 2, b"x\0")),
    "numbers where text belongs": (tag(0x0132, 5, 1, struct.pack("<II", 1, 0)), tag(0x010F, 4, 1, b"\xff" * 4)),
    "a folder of tags beyond the end": (tag(0x8825, 4, 1, struct.pack("<I", 1 << 30)),),
}
UNREADABLE = {
    "0": exif(short(0)),
    "9": exif(short(9)),
    "65535": exif(short(65535)),
    "negative": exif(tag(ORIENTATION, 9, 1, struct.pack("<i", -6))),
    "text": exif(tag(ORIENTATION, 2, 6, b"right\0")),
    "a rational of 0/0": exif(tag(ORIENTATION, 5, 1, bytes(8))),
    "cut short": exif(short(6))[:24],
    "no EXIF": b"Exif\0\0" + b"junk" * 8,
}


@pytest.fixture(params=["JPEG", "PNG", "WEBP"])
def save(request, tmp_path):
    """Save a picture, white on the left and black on the right, as it lies, with this EXIF."""

    def save(exif: bytes):
        pixels = np.zeros((16, 32, 3), np.uint8)
        pixels[:, :16] = 255
        path = tmp_path / f"picture.{request.param.lower()}"
        options = {"lossless": True} if request.param == "WEBP" else {}
        Image.fromarray(pixels).save(path, format=request.param, exif=exif, **options)
        return path

    return save


def is_upright(image) -> bool:
    """Turned by 90° clockwise: white is on top."""
    pixels = np.asarray(image)
    return pixels.shape == (32, 16, 3) and bool((pixels[:15] > 250).all() and (pixels[-15:] < 5).all())


@hostile(55, "an image whose EXIF holds values that make no sense", "upright, as its orientation says")
@pytest.mark.parametrize("odd", READABLE)
def test_odd_tags_beside_an_orientation(odd, save, capsys):
    assert is_upright(open_image(save(exif(short(6), *READABLE[odd]))))
    assert capsys.readouterr().err == ""


@hostile(
    55,
    "an image whose EXIF is broken, cut short, or tells no orientation of 1 to 8",
    "as it lies, with a warning that names the file",
)
@pytest.mark.parametrize("odd", UNREADABLE)
def test_orientation_that_says_nothing(odd, save, capsys):
    """Taken as it lies, and one line says so."""
    seen = np.asarray(open_image(save(UNREADABLE[odd])))
    assert seen.shape == (16, 32, 3)
    assert (seen[:, :15] > 250).all()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vitkernels: warning: the orientation in the EXIF of ")
    assert "picture." in line


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations(orientation, save):
    """As Pillow's own exif_transpose turns them."""
    from PIL import ImageOps

    path = save(exif(short(orientation)))
    with Image.open(path) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert (np.asarray(open_image(path)) == wanted).all()


def test_turned_and_transparent_and_of_16_bits(tmp_path):
    """The turn is the file's, the mode is what Pillow made of it: one does not lose the other."""
    pixels = np.zeros((16, 32), np.uint16)
    pixels[:, :16] = 65535
    Image.fromarray(pixels).save(tmp_path / "both.png", exif=exif(short(6), *READABLE["a rational of -1/0"]))
    assert is_upright(open_image(tmp_path / "both.png"))
