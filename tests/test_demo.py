"""The demo's data, checkpoint, readings and pictures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vitkernels
from vitkernels.ops import _triton
from vitkernels.testing import check
from vitkernels.tools.demo import measure
from vitkernels.tools.demo.attention import class_token_attention, position_similarity
from vitkernels.tools.demo.digits import CHECKPOINT, fingerprint, load_digits, load_model

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("matplotlib", reason="the demo draws with matplotlib")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def held_out():
    return load_digits()[1]


@pytest.fixture
def model():
    return load_model()


def test_split_is_stratified_and_holds_450_out():
    train, held_out = load_digits()
    assert (len(train.labels), len(held_out.labels)) == (1347, 450)
    out = torch.bincount(held_out.labels, minlength=10)
    every = out + torch.bincount(train.labels, minlength=10)
    assert ((out - every * 450 / 1797).abs() < 1).all()
    seen = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in seen for image in held_out.images)


def test_checkpoint_was_trained_without_these_held_out_digits(held_out):
    from safetensors import safe_open

    with safe_open(CHECKPOINT, framework="pt") as file:
        assert file.metadata()["held_out"] == fingerprint(held_out)


def test_held_out_accuracy(model, held_out):
    with vitkernels.use_backend("torch"), torch.inference_mode():
        right = model(held_out.images).argmax(-1) == held_out.labels
    assert right.double().mean() >= 0.97


@pytest.mark.skipif(not _triton.HAS_TRITON, reason="no Triton: there are no kernels to run")
def test_kernels_agree_with_torch_and_fp64(model, held_out, device):
    images, model = held_out.images[:4].to(device), model.to(device)
    truth = measure.fp64_logits(model, images)
    plain = measure.run_torch(model, images, truth)
    accelerated = measure.run_kernels(model, images, truth)
    verdict = check("logits", accelerated.logits, plain.logits, truth)
    assert verdict.passed, verdict.detail
    assert (accelerated.logits != plain.logits).any(), "the very bits of PyTorch: did the kernels run?"
    assert accelerated.logits.argmax(-1).equal(plain.logits.argmax(-1))
    assert accelerated.error == (accelerated.logits.double() - truth).abs().max().item()


def test_class_token_attention_is_that_of_scaled_dot_product_attention(model, held_out):
    """The rest of the last block, fed with the weights that were read, gives the model's own logits."""
    images = held_out.images[:3]
    maps = class_token_attention(model, images)
    assert maps.shape == (3, 4, 4, 4)
    assert (maps >= 0).all()
    block, kept = model.blocks[-1], []
    hook = block.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with vitkernels.use_backend("torch"), torch.no_grad():
        logits = model(images)
        hook.remove()
        x = kept[0]
        v = block.attn.qkv(block.norm1(x)).view(3, 17, 3, 4, 16)[:, :, 2]
        own_share = 1 - maps.sum((2, 3))
        mixed = torch.einsum("bhn,bnhd->bhd", torch.cat([own_share[..., None], maps.flatten(2)], -1), v)
        cls = x[:, 0] + block.attn.proj(mixed.flatten(1))
        cls = cls + block.mlp(block.norm2(cls[:, None]))[:, 0]
        torch.testing.assert_close(model.head(model.norm(cls[:, None])[:, 0]), logits, rtol=1e-4, atol=1e-4)
    assert not block._forward_pre_hooks


def test_position_similarity(model):
    similarity = position_similarity(model)
    assert similarity.shape == (4, 4, 4, 4)
    flat = similarity.view(16, 16)
    torch.testing.assert_close(flat.diagonal(), torch.ones(16))
    torch.testing.assert_close(flat, flat.T)
    a, b = model.pos_embed[0, 1].detach(), model.pos_embed[0, 1 + 5].detach()  # patches (0, 0) and (1, 1)
    torch.testing.assert_close(similarity[0, 0, 1, 1], torch.nn.functional.cosine_similarity(a, b, dim=0))


def test_demo_without_triton(tmp_path):
    out = tmp_path / "demo.png"
    code = (
        "import sys; sys.modules['triton'] = None; from vitkernels.tools.cli import main; "
        f"sys.exit(main(['demo', '--out', {str(out)!r}]))"
    )
    env = {k: v for k, v in os.environ.items() if k != "VITKERNELS_BACKEND"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "kernels did not run: Triton cannot be imported" in done.stdout
    assert "pip install triton" in done.stdout
    assert "accelerated" not in done.stdout
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_compiler_that_is_missing_is_named(monkeypatch):
    from vitkernels import runtime
    from vitkernels.emulator.build import NoCompiler

    def library():
        raise NoCompiler("a compiler is needed: apt install g++")

    monkeypatch.setattr(measure, "library", library)
    with runtime.use_backend("emulated"):
        assert "apt install g++" in measure.why_no_kernels(torch.device("cpu"))
