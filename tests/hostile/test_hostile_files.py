"""Hostile inputs 53 to 55, and the project's own JSON: files that others wrote."""

import json
import pickle
import struct
import zlib

import pytest
import torch

from benchmarks import schema
from vitkernels import tuning
from vitkernels.models import VisionTransformer
from vitkernels.models.convert import read_weights
from vitkernels.tools.console import UserError
from vitkernels.tools.demo import classify
from vitkernels.tools.demo.digits import load_model

hostile = pytest.mark.hostile
SECRET = "the payload ran"


class Payload:
    """Unpickled without care, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).write_text, (self.path, SECRET))


READERS = {
    "models": (read_weights, ValueError),
    "from_timm": (lambda path: VisionTransformer.from_timm(path, architecture="vit_tiny_patch16_224"), ValueError),
    "classify": (classify.read_weights, UserError),
}


@pytest.fixture(params=READERS)
def reader(request):
    """Whatever reads weights, and its error."""
    if request.param == "from_timm":
        pytest.importorskip("timm")
    return READERS[request.param]


@hostile(
    53,
    "a pickle that would run code: by `torch.save`, by `pickle`, under any suffix",
    "`ValueError`, and nothing is run",
)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors", ""])
@pytest.mark.parametrize("by", ["torch.save", "torch.save, old format", "pickle"])
def test_pickle_with_a_payload(by, suffix, reader, tmp_path):
    read, error = reader
    victim, path = tmp_path / "victim", tmp_path / f"weights{suffix}"
    state = {"weight": torch.zeros(2), "more": Payload(victim)}
    if by == "pickle":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=by == "torch.save")
    with pytest.raises(error, match="weights"):
        read(path)
    assert not victim.exists()
    if suffix != ".safetensors":
        torch.load(path, weights_only=False) if by != "pickle" else pickle.loads(path.read_bytes())
        assert victim.read_text() == SECRET, "the payload is one"


@hostile(
    53, "a directory whose weights are such a pickle, or whose index names one", "`ValueError`, and nothing is run"
)
@pytest.mark.parametrize("by", ["file", "index"])
def test_directory_with_a_payload(by, tmp_path):
    victim = tmp_path / "victim"
    torch.save({"more": Payload(victim)}, tmp_path / "pytorch_model.bin")
    if by == "index":
        index = {"weight_map": {"more": "pytorch_model.bin"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        read_weights(tmp_path)
    assert not victim.exists()


def safetensors(header: dict | bytes, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape, offsets, dtype="F32"):
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


LIES = {
    "empty": b"",
    "a header cut short": safetensors(entry([2, 2], [0, 16]))[:20],
    "data cut short": safetensors(entry([2, 2], [0, 16]), bytes(8)),
    "a header of 2⁶³ bytes": safetensors(entry([2, 2], [0, 16]), length=2**63),
    "a shape larger than its data": safetensors(entry([2**20, 2**20], [0, 16])),
    "a shape whose size overflows": safetensors(entry([2**62, 16], [0, 16])),
    "a shape of a negative size": safetensors(entry([-2, -2], [0, 16])),
    "data beyond the file": safetensors(entry([2, 2], [1 << 40, (1 << 40) + 16])),
    "data that ends before it begins": safetensors(entry([2, 2], [16, 0])),
    "an unknown dtype": safetensors(entry([2, 2], [0, 16], "F31")),
    "no JSON": safetensors(b"{\xff\xfe"),
    "JSON of another kind": safetensors(b"[1, 2]"),
}


@hostile(
    54,
    "a safetensors file that is cut short, or whose header lies of shapes, offsets or dtypes",
    "`ValueError` that names the file; nothing is allocated",
)
@pytest.mark.parametrize("lie", LIES)
def test_safetensors_that_lie(lie, reader, tmp_path):
    read, error = reader
    path = tmp_path / "weights.safetensors"
    path.write_bytes(LIES[lie])
    with pytest.raises(error, match=r"weights\.safetensors"):
        read(path)


@hostile(54, "the demo's checkpoint, broken", "`UserError` that names the file")
@pytest.mark.parametrize("lie", LIES)
def test_demos_checkpoint_that_lies(lie, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(LIES[lie])
    with pytest.raises(UserError, match=r"weights\.safetensors"):
        load_model(path)


@hostile(54, "whole weights of other shapes than the model's", "`ValueError` that lists them, before any is copied")
def test_weights_of_other_shapes(tmp_path):
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    state = timm.create_model("vit_tiny_patch16_224", **sizes).state_dict()
    state["head.weight"] = torch.zeros(4, 16)
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"1 of another shape: head.weight is \(4, 16\), expected \(3, 16\)"):
        VisionTransformer.from_timm(tmp_path / "weights.safetensors", architecture="vit_tiny_patch16_224", **sizes)


BAD_INDICES = {
    "no JSON": "{",
    "no object": "[]",
    "no weight_map": "{}",
    "a weight_map of another kind": '{"weight_map": ["model.safetensors"]}',
    "numbers for files": '{"weight_map": {"w": 1}}',
    "files elsewhere": '{"weight_map": {"w": "../../elsewhere.safetensors"}}',
}


@hostile(
    54,
    "an index of several safetensors files that is broken, or names files elsewhere",
    "`ValueError`, or `FileNotFoundError` within the directory",
)
@pytest.mark.parametrize("bad", BAD_INDICES)
def test_broken_index(bad, tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "a" / "model"
    folder.mkdir(parents=True)
    save_file({"w": torch.zeros(1)}, tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(BAD_INDICES[bad])
    error, match = (FileNotFoundError, "elsewhere") if bad == "files elsewhere" else (ValueError, "index.json")
    with pytest.raises(error, match=match):
        read_weights(folder)


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG's header, and little behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@hostile(55, "an image of more pixels than Pillow's limit", "`UserError`; it is not decoded")
@pytest.mark.parametrize("size", [(20_000, 10_000), (2**31 - 1, 2**31 - 1), (1, 2**31 - 1)])
def test_decompression_bomb(size, tmp_path):
    pytest.importorskip("PIL")
    path = tmp_path / "bomb.png"
    path.write_bytes(png(*size))
    with pytest.raises(UserError, match=r"bomb\.png has too many pixels"):
        classify.open_image(path)


@hostile(55, "an image of a format that is not asked for, or broken", "`UserError`")
@pytest.mark.parametrize("kind", ["TIFF", "GIF", "EPS", "SVG", "cut short", "empty"])
def test_images_of_other_kinds(kind, tmp_path):
    image = pytest.importorskip("PIL.Image").new("RGB", (8, 8))
    path = tmp_path / "picture.png"
    if kind in ("TIFF", "GIF", "EPS"):
        image.save(path, format=kind)
    else:
        text = {"SVG": b"<svg/>", "cut short": png(8, 8, bytes(10)), "empty": b""}[kind]
        path.write_bytes(text)
    with pytest.raises(UserError, match=r"picture\.png"):
        classify.open_image(path)


ROW = {
    "config": {"block_m": 8}, "median_us": 1.0, "p20_us": 1.0, "p80_us": 1.0, "heuristic_us": 1.0,
    "date": "2026-11-21", "versions": {"torch": "2.13.0"},
}  # fmt: skip
BAD_TABLES = {
    "no JSON": "{",
    "a pickle": "\x80\x04",
    "another schema": json.dumps({"schema": 2, "device": "d", "entries": {}}),
    "a list": "[]",
    "no entries": json.dumps({"schema": 1, "device": "d"}),
    "a field too many": json.dumps({"schema": 1, "device": "d", "entries": {"linear": {"k": {**ROW, "code": "1"}}}}),
    "a list as a block": json.dumps(
        {"schema": 1, "device": "d", "entries": {"linear": {"k": {**ROW, "config": {"block_m": [8]}}}}}
    ),
    "code as a time": json.dumps({"schema": 1, "device": "d", "entries": {"linear": {"k": {**ROW, "p20_us": "1"}}}}),
}


@pytest.mark.parametrize("bad", BAD_TABLES)
def test_tuning_tables(bad, tmp_path, monkeypatch):
    """A table is JSON of the schema, or a ValueError that names it."""
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "d.json").write_text(BAD_TABLES[bad], encoding="latin-1")
    monkeypatch.setattr(tuning.resources, "files", lambda package: tmp_path)
    tuning._table.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"d\.json"):
            tuning.lookup("linear", "d", "k")
    finally:
        tuning._table.cache_clear()


@pytest.mark.parametrize(
    "bad", ["{", "\x80\x04", "[]", '{"schema": 2}', '{"schema": 1}', '{"schema": 1, "suite": [], "rows": 1}']
)
def test_benchmark_results(bad, tmp_path):
    """A run's JSON is of the schema, or a ValueError that names it."""
    path = tmp_path / "results.json"
    path.write_text(bad, encoding="latin-1")
    with pytest.raises(ValueError, match=r"results\.json"):
        schema.load(path)
