"""examples/naflex.py: packed and padded, on two processes, killed and resumed, embedding, and with bad input."""

import json
import shutil

import pytest
import torch

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image", reason="images are decoded with Pillow")
timm = pytest.importorskip("timm")
safetensors = pytest.importorskip("safetensors", reason="weights and shards are safetensors")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this build of PyTorch has no gloo", allow_module_level=True)

from training import complaint, curve, here, in_two_processes, resumes, same_curve  # noqa: E402
from training_workers import naflex  # noqa: E402

import vitkernels  # noqa: E402
from vitkernels.layers import fused  # noqa: E402
from vitkernels.testing.compare import check  # noqa: E402

NAME, PATCH, COUNT, STEPS, MAX_TOKENS, TOKENS = "naflexvit_base_patch16_gap", 16, 14, 5, 40, 128
BROKEN = "cat/05.png"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images of many sizes in two classes; some have more patches than an image may have."""
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for i in range(COUNT):
        path = folder / ("bird", "cat")[i % 2] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = draw.integers(0, 256, (20 + 13 * i, 150 - 7 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def options(images, out, *more: str) -> list[str]:
    """Return the options of a small run of training; of options given twice, the last counts."""
    given = ["train", images, "--out", out, "--model", NAME, "--tokens", TOKENS, "--max-tokens", MAX_TOKENS]
    given += ["--steps", STEPS, "--warm-up", 2, "--checkpoint-every", 2, "--workers", 0]
    return [*map(str, given), *more, "--model-kwargs", "embed_dim=32", "depth=2", "num_heads=2", "init_values=1.0"]


@pytest.fixture(scope="module")
def plain(images, tmp_path_factory):
    """A run of one process that nothing interrupts, of timm's own forward, which pads."""
    out = tmp_path_factory.mktemp("plain")
    here("naflex", options(images, out, "--no-accelerate"))
    return out


@pytest.fixture
def batches(monkeypatch):
    """The padded batches that the example makes, in the order in which it makes them."""
    seen, original = [], naflex.normalized
    monkeypatch.setattr(naflex, "normalized", lambda batch, model: seen.append(batch) or original(batch, model))
    return seen


def said_of(lines: list[str]) -> list[str]:
    """Return of each line of a run how many images and patches it names, and what padding would add."""
    return [line[line.index(" images of ") :].partition(" (")[0] for line in lines if "padding would add" in line]


def counted(batches: list[dict[str, torch.Tensor]]) -> str:
    patches = sum(int(batch["patch_valid"].sum()) for batch in batches)
    return f" images of {patches} patches; padding would add {sum(b['patch_valid'].numel() for b in batches) - patches}"


def test_sizes_batches_and_padding(images, plain, batches, tmp_path, capsys):
    """Each image keeps its size but for whole patches; no batch exceeds the budget; the padding is counted."""
    here("naflex", options(images, tmp_path, "--no-flip", "--val", str(images)))
    assert torch.equal(curve(tmp_path)[:, 0], torch.arange(1.0, STEPS + 1, dtype=torch.float64))
    training, held_out = batches[:STEPS], batches[STEPS:]
    sizes = [Image.open(path).size for path in images.rglob("*.png")]
    whole = {(-(-y // PATCH), -(-x // PATCH)) for x, y in sizes}
    fit = {size for size in whole if size[0] * size[1] <= MAX_TOKENS}
    grids = []
    for batch in held_out:
        assert batch["patch_valid"].sum() <= TOKENS
        for coord, valid in zip(batch["patch_coord"], batch["patch_valid"], strict=True):
            grids.append(tuple((coord[valid].amax(0) + 1).tolist()))
            assert valid.sum() == grids[-1][0] * grids[-1][1] <= MAX_TOKENS
    assert len(grids) == COUNT and fit < set(grids) and fit < whole, "some had to be reduced"
    assert all(batch["patch_valid"].sum() <= TOKENS for batch in training)
    assert any(batch["patch_valid"].sum() < batch["patch_valid"].numel() for batch in training), "padding to be saved"
    output = capsys.readouterr().out
    assert said_of(output.splitlines()) == [counted(training), counted(held_out)]
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        right = 0
        for path in images.rglob("*.png"):
            one = naflex.pad([naflex.Patches(model, MAX_TOKENS)(Image.open(path))])
            right += int(model(naflex.normalized(one, model)).argmax()) == (path.parent.name == "cat")
    assert f"held out: {right} of {COUNT} right; {COUNT} images" in output


def gradients(model, batch, labels) -> dict[str, torch.Tensor]:
    """Return the logits and all gradients of the model's loss."""
    model.zero_grad()
    inputs = naflex.normalized(batch, model)
    logits = model(inputs | {"patches": inputs["patches"].to(model.head.weight.dtype)})
    torch.nn.functional.cross_entropy(logits, labels).backward()
    return {"logits": logits.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the emulated GPU stands for one")
def test_packed_as_padded(images, plain, batches, tmp_path, monkeypatch):
    """On the kernels the blocks see the valid tokens alone; losses, logits and gradients are those of padded images."""
    pytest.importorskip("triton")
    shapes, original = [], fused.block
    monkeypatch.setattr(
        fused, "block", lambda *a, **k: shapes.append((a[1].shape[:2], type(k["attn_mask"]))) or original(*a, **k)
    )
    with vitkernels.use_backend("emulated"):
        here("naflex", options(images, tmp_path, "--steps", "1"))
        model = timm.create_model(f"local-dir:{plain}", pretrained=True)
        valid = [int(batch["patch_valid"].sum()) for batch in batches]
        prefix = [len(batch["patch_valid"]) * model.num_prefix_tokens for batch in batches]
        packed = [((1, n + more), fused.Packed) for n, more in zip(valid, prefix, strict=True)]
        assert shapes == [shape for shape in packed for _ in range(2)]
        torch.testing.assert_close(curve(tmp_path)[0, 1].float(), curve(plain)[0, 1].float())

        batch, labels = batches[0], torch.arange(len(batches[0]["patches"])) % 2
        reference = gradients(model, batch, labels)
        vitkernels.accelerate(model)
        got = gradients(model, batch, labels)
    vitkernels.restore(model)
    truth = gradients(model.double(), batch, labels)
    for name in truth:
        verdict = check(name, got[name], reference[name], truth[name])
        assert verdict.passed, verdict.detail


def test_two_processes(images, plain, tmp_path):
    in_two_processes("naflex", options(images, tmp_path))
    same_curve(tmp_path, plain)


def test_killed_and_resumed(images, plain, tmp_path):
    resumes("naflex", options(images, tmp_path, "--no-accelerate"), tmp_path, plain, "step-00000002", 4)


def read(out) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    embeddings, skipped = {}, {}
    for path in sorted(out.glob("*.safetensors")):
        with safetensors.safe_open(path, framework="pt") as file:
            notes = json.loads(file.metadata()["embed"])
            embeddings |= zip(notes["files"], file.get_tensor("embeddings"), strict=True)
        skipped |= notes["skipped"]
    return embeddings, skipped


def test_embed(images, plain, tmp_path, capsys):
    """The vectors are timm's of each image alone; what is there is not computed again."""
    folder, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(images, folder)
    (folder / BROKEN).write_bytes((folder / BROKEN).read_bytes()[:-300])
    given = ["embed", folder, "--out", out, "--model", plain, "--tokens", TOKENS, "--max-tokens", MAX_TOKENS]
    given = [*map(str, given), "--shard-size", "5", "--workers", "1"]
    here("naflex", given)
    embeddings, skipped = read(out)
    assert embeddings.keys() == {str(p.relative_to(folder)) for p in folder.rglob("*.png")} - {BROKEN}
    assert list(skipped) == [BROKEN]
    assert "1 skipped" in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{plain}", pretrained=True, num_classes=0).eval()
    alone = {torch.float32: [], torch.float64: []}
    for dtype, rows in alone.items():
        for file in embeddings:
            one = naflex.normalized(naflex.pad([naflex.Patches(model, MAX_TOKENS)(Image.open(folder / file))]), model)
            with torch.inference_mode():
                rows.append(model.to(dtype)(one | {"patches": one["patches"].to(dtype)})[0])
        model.float()
    verdict = check("embeddings", torch.stack([*embeddings.values()]), *map(torch.stack, alone.values()))
    assert verdict.passed, verdict.detail

    before = {path.name: path.read_bytes() for path in out.iterdir()}
    gone, *kept = sorted(out.iterdir())
    gone.unlink()
    times = [path.stat().st_mtime_ns for path in kept]
    here("naflex", given)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert "was made with tokens 128, and this run has 64" in complaint("naflex", [*given, "--tokens", "64"])


def test_bad_input(images, plain, tmp_path):
    nothing = tmp_path / "nothing"
    assert f"there is no folder {nothing}" in complaint("naflex", options(nothing, tmp_path))
    assert "test_vit is a VisionTransformer; expected a NaFlexVit" in complaint(
        "naflex", [*options(images, tmp_path)[:-4], "depth=2", "--model", "test_vit"]
    )
    assert "--tokens 39 is less than 1 processes" in complaint("naflex", options(images, tmp_path, "--tokens", "39"))
    other = [*options(images, tmp_path), "--val", str(images / "cat")]
    assert "cannot read images in" in complaint("naflex", other), "before it trains"
    assert "leave them out" in complaint("naflex", options(images, tmp_path, "--parallel", "fsdp"))
    assert "tokens 128, and this run has 100" in complaint("naflex", options(images, plain, "--tokens", "100"))
    assert curve(plain).shape[0] == STEPS, "a refused run changes nothing"
