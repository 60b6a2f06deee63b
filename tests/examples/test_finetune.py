"""examples/finetune.py: from a run of pretrain.py, whole and by LoRA, on two processes, killed and resumed."""

import contextlib
import io
import re

import pytest
import torch

pytest.importorskip("PIL.Image", reason="images are decoded with Pillow")
timm = pytest.importorskip("timm")
pytest.importorskip("safetensors", reason="weights are safetensors")
pytest.importorskip("sklearn", reason="digits are scikit-learn's")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this build of PyTorch has no gloo", allow_module_level=True)

from safetensors.torch import load_file  # noqa: E402
from training import TINY, command, complaint, here, in_two_processes, resumes, same_curve  # noqa: E402
from training_workers import finetune, image_data  # noqa: E402

STEPS = 7
LORA = ("--lora", "2", "--learning-rate", "0.1")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A short run of pretrain.py."""
    out = tmp_path_factory.mktemp("pretrained")
    more = ["--model", "vit_tiny_patch16_224", *TINY, "embed_dim=64", "--img-size", "16", "--epochs", "10"]
    more += ["--batch-size", "64", "--micro-batch", "64", "--learning-rate", "4e-3", "--warm-up", "20"]
    here("pretrain", command("digits", out, *more, "--crop-scale", "1", "--checkpoint-every", "1000"))
    return out


def options(pretrained, out, *more: str) -> list[str]:
    given = ["--model", pretrained, "--img-size", 24, "--steps", STEPS, "--crop-scale", "1"]
    return command("digits", out, *map(str, given), *more)


def right(said: str) -> int:
    """Return how many held-out digits the program says are right."""
    return int(re.search(r"^held out: (\d+) of 450 right", said, re.M)[1])


def right_by_timm(out) -> int:
    """Return how many held-out digits the written model classifies right, as timm loads and runs it."""
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    digits, transform = image_data.open_data("digits", held_out=True), image_data.eval_transform(24)
    images, labels = zip(*(digits[i] for i in range(len(digits))), strict=True)
    pixels = torch.stack([transform(image) for image in images]) / 255
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.inference_mode():
        return int((model((pixels - mean) / std).argmax(-1) == torch.tensor(labels)).sum())


def test_learns(pretrained, tmp_path, capsys):
    """A short form of the run in docs/tutorials/pretrain-and-finetune.md that reaches 98 %."""
    more = ["--steps", "60", "--batch-size", "32", "--micro-batch", "32", "--learning-rate", "0.1", "--warm-up", "10"]
    here("finetune", options(pretrained, tmp_path, "--val", "digits", *more, "--checkpoint-every", "100"))
    said = capsys.readouterr().out
    assert right(said) > 0.5 * 450, "by chance it is 0.1"
    assert right_by_timm(tmp_path) == right(said)


def test_start(pretrained):
    """Positions are timm's for the larger grid, all other weights are those of the run, and the head is zero."""
    args = finetune.argparse.Namespace(model=str(pretrained), checkpoint=None, img_size=24)
    state = finetune.make_model(args, 10).state_dict()
    wanted = timm.create_model(f"local-dir:{pretrained}", pretrained=True, img_size=24).state_dict()
    assert state["pos_embed"].shape == (1, 1 + 6 * 6, 64)
    for name in wanted:
        torch.testing.assert_close(state[name], wanted[name])
    assert state.keys() - wanted.keys() == {"head.weight", "head.bias"}
    assert not state["head.weight"].any() and not state["head.bias"].any()


@pytest.fixture(scope="module")
def adapted(pretrained, tmp_path_factory):
    """A run of one process with LoRA that nothing interrupts."""
    out, said = tmp_path_factory.mktemp("adapted"), io.StringIO()
    with contextlib.redirect_stdout(said):
        here("finetune", options(pretrained, out, *LORA, "--val", "digits"))
    assert right_by_timm(out) == right(said.getvalue()), "the updates are part of the weights"
    return out


def test_lora(adapted, pretrained):
    """The adapted layers have changed by matrices of rank 2, the head as well, and nothing else."""
    before, after = load_file(pretrained / "model.safetensors"), load_file(adapted / "model.safetensors")
    changed = {name for name in before if name != "pos_embed" and not torch.equal(before[name], after[name])}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert changed == {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers}
    for name in changed:
        sizes = torch.linalg.svdvals(after[name] - before[name])
        assert sizes[2] < 1e-3 * sizes[1]
    assert after.keys() - before.keys() == {"head.weight", "head.bias"} and after["head.weight"].any()


def test_lora_in_two_processes_in_shards(adapted, pretrained, tmp_path):
    more = ("--parallel", "fsdp", "--no-accelerate", "--val", "digits")
    in_two_processes("finetune", options(pretrained, tmp_path, *LORA, *more))
    same_curve(tmp_path, adapted)
    torch.testing.assert_close(*(load_file(out / "model.safetensors") for out in (tmp_path, adapted)))


def test_lora_killed_and_resumed(adapted, pretrained, tmp_path):
    resumes("finetune", options(pretrained, tmp_path, *LORA), tmp_path, adapted, "step-00000003", 4 * 6 + 1)


def test_bad_input(adapted, pretrained, tmp_path):
    def said(*more: str) -> str:
        return complaint("finetune", options(pretrained, tmp_path / "out", *more))

    other = tmp_path / "other.pth"
    torch.save({"cls_token": torch.zeros(1, 1, 64)}, other)
    assert f"{other} cannot be loaded into {pretrained}" in said("--checkpoint", str(other))
    assert "has no config.json" in said("--model", str(tmp_path))
    torch.save(timm.create_model("test_resnet").state_dict(), other)
    assert "test_resnet has no blocks" in said("--model", "test_resnet", "--checkpoint", str(other))
