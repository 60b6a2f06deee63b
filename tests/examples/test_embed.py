"""examples/embed.py: a folder's embeddings, interrupted, in two processes, and with what stands in their way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image", reason="images are decoded with Pillow")
timm = pytest.importorskip("timm")
safetensors = pytest.importorskip("safetensors", reason="shards are safetensors")

import vitkernels  # noqa: E402
from vitkernels.testing.compare import check  # noqa: E402

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "embed.py"
MODEL, BROKEN, COUNT = "test_vit", "deeper/05.png", 14
ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Weights with a head, and a folder of images of several sizes and formats, one of them cut off."""
    folder = tmp_path_factory.mktemp("embed")
    torch.manual_seed(0)
    torch.save(timm.create_model(MODEL, num_classes=3).state_dict(), folder / "weights.pth")
    (folder / "images" / "deeper").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for i in range(COUNT):
        name = f"{'deeper/' if i % 2 else ''}{i:02}.{('png', 'png', 'JPG', 'webp')[i % 4]}"
        pixels = draw.integers(0, 256, (150 + 5 * i, 170, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
    data = (folder / "images" / BROKEN).read_bytes()
    (folder / "images" / BROKEN).write_bytes(data[: len(data) // 2])
    (folder / "images" / "notes.txt").write_text("no image")
    return folder


def options(folder: Path, out: Path, *more: str) -> list[str]:
    """Return the command line; of options given twice, the last counts."""
    given = [folder / "images", "--out", out, "--model", MODEL, "--checkpoint", folder / "weights.pth"]
    return [*map(str, given), "--batch-size", "2", "--shard-size", "3", "--workers", "1", *more]


@pytest.fixture(scope="module")
def embed():
    """The example as a module. Its workers are processes of their own, and the backend is the users'."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VITKERNELS_BACKEND", raising=False)
        patch.syspath_prepend(str(SCRIPT.parent))
        import embed

        yield embed


@pytest.fixture(scope="module")
def embedded(embed, folder) -> Path:
    """Shards of one process that was not interrupted."""
    out = folder / "reference"
    embed.main(options(folder, out))
    return out


def start(arguments: list[str], processes: int = 1) -> subprocess.Popen:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0"]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(SCRIPT), *arguments]
    # How many threads share a sum changes its bits, and these tests run on one.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def run(arguments: list[str], processes: int = 1) -> tuple[str, str]:
    """Run the example as users do, and return what it printed."""
    with start(arguments, processes) as process:
        said = process.communicate(timeout=120)
    assert process.returncode == 0, said[1]
    return said


def read(out: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the embeddings by name and why images were skipped."""
    embeddings, skipped = {}, {}
    for path in sorted(out.glob("embeddings-*.safetensors")):
        with safetensors.safe_open(path, framework="pt") as file:
            notes, rows = json.loads(file.metadata()["embed"]), file.get_tensor("embeddings")
        assert rows.dtype == torch.float32
        assert not embeddings.keys() & set(notes["files"])
        embeddings |= zip(notes["files"], rows, strict=True)
        skipped |= notes["skipped"]
    return embeddings, skipped


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def features(folder: Path, files: list[str], dtype: torch.dtype) -> torch.Tensor:
    """Return timm's own features of the images, in ``dtype``, by timm's own preprocessing."""
    model = timm.create_model(MODEL, num_classes=0).eval()
    model.load_state_dict(torch.load(folder / "weights.pth"), strict=False)
    device = "cuda" if ON_GPU else "cpu"
    config = timm.data.resolve_model_data_config(model)
    uint8 = timm.data.create_transform(**config, is_training=False, normalize=False)
    pixels = torch.stack([uint8(Image.open(folder / "images" / file).convert("RGB")) for file in files])
    mean, std = (torch.tensor(config[key], dtype=torch.float64)[:, None, None] for key in ("mean", "std"))
    with torch.inference_mode():
        return model.to(device, dtype)(((pixels / 255.0 - mean) / std).to(device, dtype)).cpu()


def agrees_with_timm(folder: Path, out: Path) -> None:
    embeddings, _ = read(out)
    files = [*embeddings]
    got = torch.stack([*embeddings.values()]).to(DTYPE)  # exact: they were widened
    verdict = check("embeddings", got, features(folder, files, DTYPE), features(folder, files, torch.float64))
    assert verdict.passed, verdict.detail


def test_features_are_timms(folder, embedded):
    embeddings, skipped = read(embedded)
    images = folder / "images"
    files = {path.relative_to(images).as_posix() for path in images.rglob("*.*") if path.suffix != ".txt"}
    assert len(files) == COUNT
    assert embeddings.keys() == files - {BROKEN}
    assert list(skipped) == [BROKEN] and BROKEN in skipped[BROKEN]
    agrees_with_timm(folder, embedded)


def test_killed_and_resumed_by_two_processes(folder, embedded, tmp_path):
    """The files are those of a run of one process that was not interrupted, bit for bit."""
    names = sorted(path.name for path in embedded.iterdir())
    assert len(names) == 5
    os.mkfifo(tmp_path / names[1])  # nobody reads it, so the write blocks, and the run cannot be over too soon
    with start(options(folder, tmp_path)) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / names[0]).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    (tmp_path / names[1]).unlink()
    first = (tmp_path / names[0]).stat()
    assert sorted(path.name for path in tmp_path.iterdir()) == names[:1]

    said, complaints = run(options(folder, tmp_path), processes=2)
    assert contents(tmp_path) == contents(embedded)
    assert (tmp_path / names[0]).stat().st_mtime_ns == first.st_mtime_ns, "what was there is not computed again"
    said = sorted(line for line in said.splitlines() if line.startswith("embed:"))
    assert [line.rpartition(";")[0] for line in said] == [
        "embed: 5 images embedded, 0 skipped; 1 of 3 shards were there",
        "embed: 5 images embedded, 1 skipped; 0 of 2 shards were there",
    ]
    assert sum("embed: skipped: " in line and BROKEN in line for line in complaints.splitlines()) == 1


@pytest.mark.skipif(ON_GPU, reason="the other tests run the kernels")
def test_on_the_kernels(embed, folder, tmp_path):
    pytest.importorskip("triton")
    small = tmp_path / "images"
    small.mkdir()
    for name in ("00.png", "04.png"):
        shutil.copy(folder / "images" / name, small)
    with vitkernels.use_backend("emulated"):
        embed.main([str(small), *options(folder, tmp_path / "out")[1:]])
    agrees_with_timm(folder, tmp_path / "out")


def test_parquet(embed, folder, embedded, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet is optional")
    embed.main(options(folder, tmp_path, "--format", "parquet"))
    rows = [row for path in sorted(tmp_path.iterdir()) for row in parquet.read_table(path).to_pylist()]
    wanted, _ = read(embedded)
    assert [row["file"] for row in rows] == [*wanted]
    torch.testing.assert_close(
        torch.tensor([row["embedding"] for row in rows]), torch.stack([*wanted.values()]), rtol=1e-5, atol=1e-5
    )
    capsys.readouterr()
    embed.main(options(folder, tmp_path, "--format", "parquet"))
    assert "0 images embedded, 0 skipped; 5 of 5 shards were there" in capsys.readouterr().out


@pytest.fixture
def complaint(embed, capsys):
    """Run the example with what stands in its way, and return the one line that it exits with."""

    def run(arguments: list[str]) -> str:
        with pytest.raises(SystemExit) as stopped:
            embed.main(arguments)
        said = stopped.value.code
        assert isinstance(said, str) and said.startswith("embed: ") and "\n" not in said  # Python prints it, status 1
        return said

    return run


def test_another_run_of_the_same_folder(complaint, embed, folder, embedded, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(embedded, out)
    embed.main(options(folder, out))
    assert "0 images embedded, 0 skipped; 5 of 5 shards were there" in capsys.readouterr().out
    assert "batch size 2, and this run has 4" in complaint(options(folder, out, "--batch-size", "4"))
    assert "shard size 3, and this run has 4" in complaint(options(folder, out, "--shard-size", "4"))
    assert "model 'test_vit', and this run" in complaint(options(folder, out, "--model", "timm/test_vit"))
    torch.save(timm.create_model(MODEL, num_classes=3).state_dict(), tmp_path / "other.pth")
    assert "made with weights" in complaint(options(folder, out, "--checkpoint", str(tmp_path / "other.pth")))
    assert contents(out) == contents(embedded)
    images = tmp_path / "images"
    shutil.copytree(folder / "images", images)
    (images / "00.png").rename(images / "0.png")
    assert "names of images" in complaint([str(images), *options(folder, out)[1:]])
    (images / "0.png").unlink()
    assert "number of images 14, and this run has 13" in complaint([str(images), *options(folder, out)[1:]])
    shard = min(out.iterdir())
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard} is no whole shard" in complaint(options(folder, out))


def test_bad_input(complaint, folder, tmp_path, monkeypatch):
    out, images = tmp_path / "out", tmp_path / "images"

    def of_images() -> str:
        return complaint([str(images), *options(folder, out)[1:]])

    assert f"cannot list {images}: No such file" in of_images()
    images.mkdir()
    (images / "notes.txt").touch()
    assert f"{images} holds no images" in of_images()
    (images / os.fsdecode(b"\xff.png")).touch()
    assert "not in UTF-8" in of_images()
    assert not out.exists()

    assert "did you mean test_vit" in complaint(options(folder, out, "--model", "test_vitt"))
    nothing = tmp_path / "no.pth"
    assert f"{nothing} cannot be loaded" in complaint(options(folder, out, "--checkpoint", str(nothing)))
    torch.save({"cls_token": torch.zeros(1, 1, 2)}, nothing)
    assert "cannot be loaded into test_vit: " in complaint(options(folder, out, "--checkpoint", str(nothing)))
    (tmp_path / "taken").touch()
    assert "it is no folder" in complaint(options(folder, tmp_path / "taken"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "needs pyarrow" in complaint(options(folder, out, "--format", "parquet"))
    assert not any(out.iterdir())


def test_full_disk(complaint, embed, folder, embedded, tmp_path):
    """The shards before it stay, and the same command goes on."""
    names = sorted(path.name for path in embedded.iterdir())
    (tmp_path / names[1]).symlink_to("/dev/full")
    assert f"cannot write {tmp_path / names[1]}: No space left on device" in complaint(options(folder, tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == names[:2]
    (tmp_path / names[1]).unlink()
    embed.main(options(folder, tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_worker_dies_or_the_images_disappear(complaint, embed, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(embed.Images, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    said = complaint(options(folder, tmp_path / "out"))
    assert "a worker that decodes images died" in said and "the same command goes on" in said
    monkeypatch.undo()
    images = tmp_path / "images"
    shutil.copytree(folder / "images", images)
    listed = embed.list_images(images)
    shutil.rmtree(images)
    monkeypatch.setattr(embed, "list_images", lambda _: listed)
    assert "cannot read " in complaint([str(images), *options(folder, tmp_path / "out")[1:]]), "none is skipped for it"
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("wrong", ["0", "-1", "65537", "many"])
def test_usage(embed, folder, wrong, capsys):
    with pytest.raises(SystemExit):
        embed.main(options(folder, folder / "none", "--batch-size", wrong))
    assert f"{wrong!r} is no whole number from 1 to 65536" in capsys.readouterr().err
