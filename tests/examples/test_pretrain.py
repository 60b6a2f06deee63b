"""examples/pretrain.py: on two processes, killed and resumed, from every kind of data, and with what is in its way."""

import argparse
import os
import resource
import shutil
import signal
import sys
import time

import pytest
import torch

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image", reason="images are decoded with Pillow")
timm = pytest.importorskip("timm")
pytest.importorskip("safetensors", reason="weights are safetensors")
pytest.importorskip("sklearn", reason="digits are scikit-learn's")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this build of PyTorch has no gloo", allow_module_level=True)

from training import TINY, command, complaint, curve, here, in_two_processes, killed, same_curve, weights  # noqa: E402
from training_workers import common, image_data  # noqa: E402

import vitkernels  # noqa: E402
from vitkernels.tools.console import UserError  # noqa: E402

COUNT, CLASSES = 10, ("bird", "cat")
STEPS = 7
EPOCHS = STEPS * 16 / 1347
DROPPING = ("--dropout", "0.1", "--drop-path", "0.2")


def options(out, *more: str, data="digits") -> list[str]:
    return command(data, out, "--model", "vit_tiny_patch16_224", *TINY, "--epochs", str(EPOCHS), *more)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of one process that nothing interrupts, of timm's own forward."""
    out = tmp_path_factory.mktemp("plain")
    here("pretrain", options(out, "--no-accelerate"))
    return out


def test_trained(plain):
    """The log has every step, the schedule is the paper's, and timm loads the weights."""
    log = curve(plain)
    assert log[:, 0].tolist() == [*range(1, STEPS + 1)]
    rates = [0.5, 1, *(1 - done / 5 for done in range(5))]
    assert log[:, 2].tolist() == pytest.approx([8e-4 * rate for rate in rates])
    assert [path.name for path in plain.glob("*step-*")] == [f"step-{STEPS:08}"]
    model = timm.create_model(f"local-dir:{plain}", pretrained=True)
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 32) and model.num_classes == 0


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A run like ``plain`` that was killed in its step 5, and has the checkpoint of step 3."""
    out = tmp_path_factory.mktemp("cut")
    killed("pretrain", options(out, "--no-accelerate"), "forward", 4 * 6 + 2)  # a step has 6 parts
    assert [path.name for path in out.glob("*step-*")] == ["step-00000003"]
    return out


def test_two_processes(plain, tmp_path):
    in_two_processes("pretrain", options(tmp_path, "--micro-batch", "5"))
    same_curve(tmp_path, plain)


def test_resumed_by_two_processes_in_shards(plain, cut, tmp_path):
    shutil.copytree(cut, tmp_path, dirs_exist_ok=True)
    in_two_processes("pretrain", options(tmp_path, "--parallel", "fsdp", "--recompute", "all-but-attention"))
    same_curve(tmp_path, plain)
    assert weights(tmp_path) != weights(plain), "the sums were others"


def test_killed_and_resumed(tmp_path):
    """As it writes a checkpoint; the weights are those of a run that was not killed, bit for bit."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    here("pretrain", options(whole, *DROPPING))
    killed("pretrain", options(cut, *DROPPING), "save", 2)
    assert {path.name for path in cut.glob("*step-*")} == {"step-00000003", ".step-00000006"}
    here("pretrain", options(cut, *DROPPING))
    assert weights(cut) == weights(whole)
    assert torch.equal(curve(cut), curve(whole))
    assert [path.name for path in cut.glob("*step-*")] == [f"step-{STEPS:08}"]
    here("pretrain", options(cut, *DROPPING))
    assert weights(cut) == weights(whole), "a run that is over stays as it is"


def test_tensorboard(plain, tmp_path, monkeypatch):
    """Of a run that was killed, TensorBoard has each step once, and the numbers of log.csv."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    given = options(tmp_path, "--no-accelerate", "--tensorboard")
    killed("pretrain", given, "forward", 4 * 6 + 2)
    time.sleep(1)  # TensorBoard reads the files in the order of their names, which hold the second
    here("pretrain", given)
    board = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    log, columns = curve(tmp_path), (tmp_path / "log.csv").read_text().splitlines()[0].split(",")
    assert {*board.Tags()["scalars"]} == {*columns[1:]}
    for i, name in enumerate(columns[1:4], start=1):
        events = board.Scalars(name)
        assert [event.step for event in events] == log[:, 0].tolist() == [*range(1, STEPS + 1)]
        assert [event.value for event in events] == log[:, i].float().tolist()
    assert torch.equal(log, curve(plain)), "and nothing else changes"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said = complaint("pretrain", options(tmp_path / "none", "--tensorboard"))
    assert "pretrain: --tensorboard: " in said and said.endswith(": pip install tensorboard")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "tensorboard").touch()
    monkeypatch.undo()
    said = complaint("pretrain", options(tmp_path / "taken", "--tensorboard"))
    assert f"cannot write to {tmp_path / 'taken' / 'tensorboard'}: " in said


def test_compiled(tmp_path):
    small = ("--model-kwargs", *TINY[1:], "depth=1", "--epochs", str(2 * 16 / 1347))
    for out, more in (("plain", ()), ("compiled", ("--compile",))):
        here("pretrain", options(tmp_path / out, *small, *more))
    same_curve(tmp_path / "compiled", tmp_path / "plain")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests run the kernels")
def test_on_the_kernels(plain, tmp_path):
    pytest.importorskip("triton")
    with vitkernels.use_backend("emulated"):
        here("pretrain", options(tmp_path, "--epochs", str(2 * 16 / 1347), "--warm-up", "2"))
    got, wanted = curve(tmp_path), curve(plain)[:2]
    torch.testing.assert_close(got.float(), wanted.float())
    assert not torch.equal(got, wanted), "the kernels' sums have another order"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The same images and labels as a folder, as two shards, and as a data set of Hugging Face."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (20 + i, 24, 3), dtype=np.uint8)) for i in range(COUNT)]
    for i, image in enumerate(images):
        path = folder / "folder" / CLASSES[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return folder, images


def same_images(data, images) -> None:
    assert (len(data), data.num_classes) == (COUNT, len(CLASSES))
    got = {np.asarray(image).tobytes(): label for image, label in (data[i] for i in range(COUNT))}
    assert got == {np.asarray(image).tobytes(): i % 2 for i, image in enumerate(images)}


def test_image_folder(stored):
    folder, images = stored
    same_images(image_data.open_data(folder / "folder"), images)


def test_shards(stored, tmp_path):
    """They are written by the library webdataset; one that is cut off is named, wherever the cut is."""
    webdataset = pytest.importorskip("webdataset", reason="it writes the shards")
    images = stored[1]
    for number in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{number}.tar")) as writer:
            for i in range(number * COUNT // 2, (number + 1) * COUNT // 2):
                writer.write({"__key__": f"deeper/{i:02}", "png": images[i], "cls": i % 2})
    same_images(image_data.open_data(tmp_path), images)
    path = tmp_path / "1.tar"
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))
    for cut in (0, 100, end // 2, end, -(-end // 512) * 512):  # the last is between two members
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=f"{path} is no whole shard: "):
            image_data.open_data(tmp_path)
    path.write_bytes(whole.replace(b"\x89PNG", b"\x89PNX"))
    with pytest.raises(UserError, match=f"{path}/deeper/05.png is no image"):
        image_data.open_data(tmp_path)[5]
    with webdataset.TarWriter(str(path)) as writer:
        writer.write({"__key__": "05", "png": images[5]})
    with pytest.raises(UserError, match=f"{path} holds 05.png without a .cls"):
        image_data.open_data(tmp_path)
    with webdataset.TarWriter(str(path)) as writer:
        writer.write({"__key__": "05", "png": images[5], "cls": -1})
    with pytest.raises(UserError, match="hold a label below 0"):
        image_data.open_data(tmp_path)


def test_hugging_face(stored, tmp_path):
    datasets = pytest.importorskip("datasets", reason="it writes the data set")
    _, images = stored
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=list(CLASSES))})
    columns = {"picture": images, "kind": [i % 2 for i in range(COUNT)]}
    found = datasets.Dataset.from_dict(columns, features=features)
    found.save_to_disk(tmp_path / "one")
    same_images(image_data.open_data(tmp_path / "one"), images)
    datasets.DatasetDict(train=found).save_to_disk(tmp_path / "dict")
    with pytest.raises(UserError, match="holds train: give one of them"):
        image_data.open_data(tmp_path / "dict")
    same_images(image_data.open_data(tmp_path / "dict" / "train"), images)
    columns["kind"][3] = -1
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "partly")
    with pytest.raises(UserError, match="holds images without a label"):
        image_data.open_data(tmp_path / "partly")
    found.remove_columns("kind").save_to_disk(tmp_path / "unlabelled")
    with pytest.raises(UserError, match="expected an Image and a ClassLabel"):
        image_data.open_data(tmp_path / "unlabelled")


def test_broken_images(stored, tmp_path, capfd):
    """One is named and replaced by the next; where many are broken, the run ends, and its checkpoint stays."""
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(stored[0] / "folder", images)
    broken = images / "bird" / "02.png"
    broken.write_bytes(broken.read_bytes()[:-300])
    small = ("--epochs", "3", "--batch-size", "5", "--workers", "1", "--crop-scale", "1")
    here("pretrain", options(out, *small, data=images))
    skipped = [line for line in capfd.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert len(skipped) == 3 and all(str(broken) in line for line in skipped), "once an epoch"
    assert len(curve(out)) == 6

    broken.unlink()
    broken.mkdir()  # a name in the list, which cannot be read
    data = image_data.open_data(images)
    data.samples.insert(1, (str(broken), 0))
    error = image_data.Samples(data, image_data.eval_transform(8), 0)[0, 1]
    assert isinstance(error, UserError) and "cannot read" in str(error)
    for path in images.rglob("*.png"):
        if path.is_file():
            path.write_bytes(b"no image")
    assert "10 images in a row do not decode" in complaint("pretrain", options(tmp_path / "other", *small, data=images))


def test_bad_input(plain, stored, tmp_path):
    nothing = tmp_path / "nothing"
    assert f"there is no folder {nothing}" in complaint("pretrain", options(tmp_path, data=nothing))
    nothing.mkdir()
    assert f"cannot read images in {nothing}" in complaint("pretrain", options(tmp_path, data=nothing))
    assert "did you mean vit_tiny" in complaint("pretrain", options(tmp_path, "--model", "vit_tinny_patch16_224"))
    assert "test_resnet cannot be built: " in complaint("pretrain", options(tmp_path, "--model", "test_resnet"))
    assert "--model-kwargs gives img_size" in complaint("pretrain", options(tmp_path, "--model-kwargs", "img_size=8"))
    assert "digits has 10 classes, and" in complaint(
        "pretrain", options(tmp_path, "--val", "digits", data=stored[0] / "folder")
    )
    (tmp_path / "taken").touch()
    assert "it is no folder" in complaint("pretrain", options(tmp_path / "taken"))
    args = argparse.Namespace(batch_size=16, out=tmp_path)
    with pytest.raises(UserError, match="--batch-size 16 is no multiple of 3"):
        common.check_options(args, common.Processes(0, 3, torch.device("cpu")))
    assert "lower --learning-rate" in complaint("pretrain", options(tmp_path / "nan", "--learning-rate", "1e30"))


def test_another_run(plain, tmp_path):
    """A checkpoint of another model or run is refused, and stays as it is."""
    out = tmp_path / "out"
    shutil.copytree(plain, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    kwargs = [*TINY[:-1], "mlp_ratio=1.0"]
    assert "model_kwargs {" in complaint("pretrain", options(out, *kwargs))
    assert "batch_size 16, and this run has 8" in complaint("pretrain", options(out, "--batch-size", "8"))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (shard,) = out.glob("step-*/__0_0.distcp")
    shard.write_bytes(shard.read_bytes()[:5000])
    assert f"{shard.parent} cannot be loaded: " in complaint("pretrain", options(out))
    (shard.parent / "settings.json").unlink()
    assert f"{shard.parent} is no checkpoint of this program" in complaint("pretrain", options(out))


def test_full_disk(plain, cut, tmp_path):
    """The run ends, its newest checkpoint stays, and the same command goes on from it."""
    shutil.copytree(cut, tmp_path, dirs_exist_ok=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # the disk takes no more of a file
    try:
        said = complaint("pretrain", options(tmp_path, "--no-accelerate"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"cannot write {tmp_path / 'step-00000006'}: " in said and "File too large" in said
    assert [path.name for path in tmp_path.glob("*step-*")] == ["step-00000003"]
    here("pretrain", options(tmp_path, "--no-accelerate"))
    assert weights(tmp_path) == weights(plain)


def test_worker_dies(tmp_path, monkeypatch):
    monkeypatch.setattr(image_data.Samples, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    said = complaint("pretrain", options(tmp_path, "--workers", "1"))
    assert "a worker that decodes images died" in said and "the same command goes on" in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--batch-size", "0"), "'0' is no whole number from 1"),
        (("--workers", "-1"), "'-1' is no whole number from 0"),
        (("--crop-scale", "1.5"), "'1.5' is no number from 0.01 to 1"),
        (("--learning-rate", "nan"), "'nan' is no number from 0"),
        (("--model-kwargs", "x"), "no key=value"),
    ],
)
def test_usage(given, said, tmp_path, capsys):
    with pytest.raises(SystemExit):
        here("pretrain", options(tmp_path, *given))
    assert said in capsys.readouterr().err
