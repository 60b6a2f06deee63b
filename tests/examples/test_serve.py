"""examples/serve.py: a package that calls the kernels, loaded in fresh processes and served over HTTP."""

import concurrent.futures
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image", reason="images are decoded with Pillow")
timm = pytest.importorskip("timm")

from vitkernels.testing.compare import check  # noqa: E402

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "serve.py"
MODEL, MAX_BATCH = "test_vit", 3
ON_GPU = torch.cuda.is_available()
DTYPE, DEVICE = (torch.bfloat16, "cuda") if ON_GPU else (torch.float32, "cpu")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def serve():
    """The example as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        import serve

        yield serve


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    torch.manual_seed(0)
    torch.save(timm.create_model(MODEL, num_classes=3).state_dict(), folder / "weights.pth")
    return folder


def options(folder: Path, *more: str) -> list[str]:
    """Return the command line; of options given twice, the last counts."""
    given = ["package", folder / "vit.pt2", "--model", MODEL, "--checkpoint", folder / "weights.pth"]
    return [*map(str, given), "--max-batch", str(MAX_BATCH), *more]


@pytest.fixture(scope="module")
def packaged(serve, folder) -> Path:
    """A package that was made while the ops run their kernels."""
    serve.main(options(folder))
    return folder / "vit.pt2"


def pictures(count: int) -> list[bytes]:
    """Return images as PNG."""
    draw = np.random.default_rng(0)
    files = []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (180, 170, 3), dtype=np.uint8)).save(file, "png")
        files.append(file.getvalue())
    return files


def to_pixels(files: list[bytes]) -> torch.Tensor:
    """Return the images in uint8 as timm's own transform makes them."""
    config = timm.data.resolve_model_data_config(timm.create_model(MODEL))
    transform = timm.data.create_transform(**config, is_training=False, normalize=False)
    return torch.stack([transform(Image.open(io.BytesIO(file))) for file in files])


def logits(folder: Path, pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return timm's own results in ``dtype``."""
    model = timm.create_model(MODEL, num_classes=3).eval()
    model.load_state_dict(torch.load(folder / "weights.pth"))
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key], dtype=torch.float64)[:, None, None] for key in ("mean", "std"))
    with torch.inference_mode():
        return model.to(DEVICE, dtype)(((pixels / 255.0 - mean) / std).to(DEVICE, dtype)).cpu()


def agrees_with_timm(folder: Path, got: torch.Tensor, pixels: torch.Tensor) -> None:
    got = got.to(DTYPE)  # exact: it was widened
    verdict = check("logits", got, logits(folder, pixels, DTYPE), logits(folder, pixels, torch.float64))
    assert verdict.passed, verdict.detail


FRESH = """
import sys

import torch

package, folder, device = sys.argv[1:]
try:
    torch._inductor.aoti_load_package(package)
except RuntimeError as error:
    assert "Could not find schema for vitkernels::" in str(error), error  # which the pages quote
else:
    sys.exit("loaded without vitkernels: the package does not call its ops")

import vitkernels.ops

run, pixels = torch._inductor.aoti_load_package(package), torch.load(f"{folder}/pixels.pt").to(device)
torch.save([run(pixels[:1]).cpu(), run(pixels).cpu()], f"{folder}/outputs.pt")
"""


def test_fresh_process_needs_the_ops_only(folder, packaged, tmp_path):
    """The recipe without the server, with batches of two sizes; without a GPU the ops compute in PyTorch here."""
    pixels = to_pixels(pictures(MAX_BATCH))
    torch.save(pixels, tmp_path / "pixels.pt")
    command = [sys.executable, "-c", FRESH, packaged, tmp_path, DEVICE]
    environment = ENVIRONMENT | {"VITKERNELS_BACKEND": "auto"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for outputs in torch.load(tmp_path / "outputs.pt"):
        agrees_with_timm(folder, outputs, pixels[: len(outputs)])


@pytest.fixture(scope="module")
def port(packaged):
    """The port of a server in a fresh process, where the ops run their kernels."""
    command = [sys.executable, str(SCRIPT), "run", str(packaged), "--port", "0"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            line = process.stdout.readline()
            assert "serve: " in line, process.stderr.read()
            yield int(line.rpartition(":")[2])
        finally:
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and said.endswith("serve: stopped\n"), said


def post(port: int, body: bytes, **headers: str) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/", body, headers)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_served_one_at_a_time_and_in_batches(folder, port):
    files = pictures(2 * MAX_BATCH)
    with concurrent.futures.ThreadPoolExecutor(len(files)) as threads:
        answers = [post(port, files[0]), *threads.map(lambda file: post(port, file), files)]
    assert [status for status, _ in answers] == [200] * (1 + len(files))
    got = torch.tensor([answer["outputs"] for _, answer in answers])
    agrees_with_timm(folder, got[:1], to_pixels(files[:1]))
    agrees_with_timm(folder, got[1:], to_pixels(files))


def test_bad_requests(port):
    file = pictures(1)[0]
    assert post(port, b"no image") == (
        400,
        {"error": "the image is no image of a known format; expected PNG, JPEG, WEBP"},
    )
    status, answer = post(port, file[: len(file) // 2])
    assert status == 400 and "the image" in answer["error"]
    assert post(port, file, **{"Content-Length": str(1 << 40)})[0] == 413
    assert post(port, file)[0] == 200, "the server goes on"


def test_waiting_images_share_a_batch(serve, packaged, monkeypatch):
    runner = serve.Runner(packaged)
    sizes = []

    def run(pixels):
        sizes.append(len(pixels))
        if len(sizes) == 1:
            more.extend(runner.submit(image) for image in images)  # they wait while the first one is computed
        if len(sizes) == 3:
            raise RuntimeError("out of memory")
        return pixels.flatten(1)[:, :1].float()

    monkeypatch.setattr(runner, "run", run)
    images, more = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2), []
    assert runner.submit(images[0]).result(60) == 0
    assert [future.result(60).item() for future in more[:MAX_BATCH]] == [0, 1, 2], "each gets its own"
    for future in more[MAX_BATCH:]:
        with pytest.raises(RuntimeError, match="out of memory"):
            future.result(60)
    assert sizes == [1, MAX_BATCH, 2]
    assert runner.submit(images[4]).result(60) == 4, "the thread goes on"


@pytest.fixture
def complaint(serve):
    """Run the example and return the one line that it ends with."""

    def run(arguments: list[str]) -> str:
        with pytest.raises(SystemExit) as ended:
            serve.main(arguments)
        said = ended.value.code
        assert said.startswith("serve: ") and "\n" not in said
        return said

    return run


def test_bad_input(complaint, serve, folder, packaged, tmp_path, capsys, monkeypatch):
    assert "did you mean test_vit" in complaint(options(folder, "--model", "test_vitt"))
    torch.save({"cls_token": torch.zeros(1, 1, 2)}, tmp_path / "other.pth")
    assert "cannot be loaded into test_vit: " in complaint(options(folder, "--checkpoint", str(tmp_path / "other.pth")))
    nowhere = str(tmp_path / "none" / "vit.pt2")
    assert "there is no folder" in complaint(["package", nowhere, *options(folder)[2:]])
    assert f"there is no package {nowhere}" in complaint(["run", nowhere])
    (tmp_path / "weights.pt2").write_bytes((folder / "weights.pth").read_bytes())
    said = complaint(["run", str(tmp_path / "weights.pt2")])
    assert "weights.pt2 cannot be loaded as a package of this program (" in said
    monkeypatch.setattr(torch, "__version__", "2.99")
    assert "and this is 2.99" in complaint(["run", str(packaged)])
    monkeypatch.undo()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen at 127.0.0.1:{port}: " in complaint(["run", str(packaged), "--port", str(port)])
    with pytest.raises(SystemExit):
        serve.main(options(folder, "--max-batch", "1"))
    assert "'1' is no whole number from 2 to 4096" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        serve.main(["run", str(folder / "weights.pth")])
    assert "does not end in .pt2" in capsys.readouterr().err
