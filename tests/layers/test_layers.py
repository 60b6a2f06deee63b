"""Layers against timm's of the same name, with one state dict."""

import copy
import functools

import pytest
import torch
from torch import nn

import vitkernels
from vitkernels import layers, reference
from vitkernels.testing import check
from vitkernels.testing.sums import summed_alike

timm = pytest.importorskip("timm")
pytest.importorskip("timm.layers")
from timm.models.vision_transformer import Block as TimmBlock  # noqa: E402

C, H = 32, 2  # with MLPs of 128 and fewer than 16 rows, whose kernels the tests of swapped models share
PAIRS = {
    "LayerNorm": (lambda: layers.LayerNorm(C), lambda: timm.layers.LayerNorm(C)),
    "LayerNorm(eps)": (lambda: layers.LayerNorm(C, eps=1e-2), lambda: timm.layers.LayerNorm(C, eps=1e-2)),
    "LayerNorm(bias)": (lambda: layers.LayerNorm(C, bias=False), lambda: timm.layers.LayerNorm(C, bias=False)),
    "LayerNorm(affine)": (lambda: layers.LayerNorm(C, affine=False), lambda: timm.layers.LayerNorm(C, affine=False)),
    "RmsNorm": (lambda: layers.RmsNorm(C), lambda: timm.layers.RmsNorm(C)),
    "RmsNorm(eps)": (lambda: layers.RmsNorm(C, eps=1e-2), lambda: timm.layers.RmsNorm(C, eps=1e-2)),
    "RmsNorm(affine)": (lambda: layers.RmsNorm(C, affine=False), lambda: timm.layers.RmsNorm(C, affine=False)),
    "SwiGLU": (
        lambda: layers.SwiGLU(C, 85, norm_layer=layers.LayerNorm),
        lambda: timm.layers.SwiGLU(C, 85, norm_layer=timm.layers.LayerNorm),
    ),
    "SwiGLU(plain)": (
        lambda: layers.SwiGLU(C, 85, bias=False, align_to=8),
        lambda: timm.layers.SwiGLU(C, 85, bias=False, align_to=8),
    ),
    "SwiGLUPacked": (lambda: layers.SwiGLUPacked(C, 170), lambda: timm.layers.SwiGLUPacked(C, 170)),
    "SwiGLUPacked(gate_last)": (
        lambda: layers.SwiGLUPacked(C, 256, act_layer="gelu", gate_last=True),
        lambda: timm.layers.GluMlp(C, 256, act_layer=nn.GELU, gate_last=True),
    ),
    "LayerScale": (lambda: layers.LayerScale(C), lambda: timm.layers.LayerScale(C)),
    "Linear": (lambda: layers.Linear(C, 20), lambda: nn.Linear(C, 20)),
    "Attention": (
        lambda: layers.Attention(C, num_heads=H, qkv_bias=True),
        lambda: timm.layers.Attention(C, num_heads=H, qkv_bias=True),
    ),
    "Attention(head_dim)": (
        lambda: layers.Attention(C, num_heads=2, attn_head_dim=20, dim_out=30, proj_bias=False),
        lambda: timm.layers.Attention(C, num_heads=2, attn_head_dim=20, dim_out=30, proj_bias=False),
    ),
    "Attention(qk_norm)": (
        lambda: layers.Attention(C, num_heads=H, qk_norm=True),
        lambda: timm.layers.Attention(C, num_heads=H, qk_norm=True, norm_layer=timm.layers.LayerNorm),
    ),
    "Block": (
        lambda: layers.Block(C, H, qkv_bias=True, init_values=0.5),
        lambda: TimmBlock(C, H, qkv_bias=True, init_values=0.5),
    ),
    "Block(plain)": (
        lambda: layers.Block(C, H, proj_bias=False, act_layer="silu"),
        lambda: TimmBlock(C, H, proj_bias=False, act_layer=nn.SiLU),
    ),
    "Mlp": (lambda: layers.Mlp(C, 128, 20, bias=False), lambda: timm.layers.Mlp(C, 128, 20, bias=False)),
    **{
        f"Mlp({name})": (
            lambda name=name: layers.Mlp(C, 128, act_layer=name),
            lambda act=act: timm.layers.Mlp(C, 128, act_layer=act),
        )
        for name, act in {
            "gelu_tanh": functools.partial(nn.GELU, approximate="tanh"),
            "quick_gelu": timm.layers.activations.QuickGELU,
        }.items()
    },
}


# One for each op: what else a layer may hand it, PyTorch's side shows, and what that does in a kernel is tests/ops'.
THROUGH_KERNELS = (
    "LayerNorm", "RmsNorm", "SwiGLU", "SwiGLUPacked", "SwiGLUPacked(gate_last)", "LayerScale", "Linear", "Attention",
    "Block", "Mlp",
)  # fmt: skip


@pytest.fixture(params=["torch", "kernels"])
def backend(request):
    """Both sides of every op: PyTorch, and the kernels (emulated on a CPU)."""
    if request.param == "kernels":
        pytest.importorskip("triton")
    kernels = "triton" if torch.cuda.is_available() else "emulated"
    with vitkernels.use_backend(kernels if request.param == "kernels" else "torch"):
        yield request.param


def _share(ours, theirs):
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


def _results(module, x, upstream, run=None):
    x = x.detach().clone().requires_grad_()
    y = module(x) if run is None else run(module, x)
    parameters = dict(module.named_parameters())
    grads = torch.autograd.grad(y, [x, *parameters.values()], upstream)
    return {"output": y, **dict(zip(["input", *parameters], grads, strict=True))}


@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "torch") for name in PAIRS), *((name, "kernels") for name in THROUGH_KERNELS)],
    indirect=["backend"],
)
def test_output_and_gradients_agree_with_timm(name, backend, device):
    ours, theirs = (make().to(device).eval() for make in PAIRS[name])
    _share(ours, theirs)
    x = torch.randn(2, 7, C, device=device)
    upstream = torch.randn_like(theirs(x))
    actual = _results(ours, x, upstream)
    with summed_alike(x):
        yardstick = _results(theirs, x, upstream)
    truth = _results(copy.deepcopy(theirs).double(), x.double(), upstream.double())
    assert actual.keys() == truth.keys()
    verdicts = [check(key, actual[key], yardstick[key], truth[key]) for key in truth]
    failed = [v for v in verdicts if not v.passed]
    assert not failed, "\n".join(f"{v.name}: {v.detail}" for v in failed)


def test_attention_reads_the_scale_of_the_module():
    ours, theirs = layers.Attention(C, num_heads=H), timm.layers.Attention(C, num_heads=H)
    _share(ours, theirs)
    ours.scale = 0.7
    theirs.fused_attn, theirs.scale = False, 0.7  # timm's fused path takes no notice of it
    x = 3.0 * torch.randn(2, 7, C)
    with vitkernels.use_backend("torch"):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_patch_embed_agrees_with_timm(backend, device):
    kwargs = {"img_size": (16, 24), "patch_size": (8, 4), "in_chans": 2, "embed_dim": 20}  # no two of one size
    ours, theirs = layers.PatchEmbed(**kwargs).to(device), timm.layers.PatchEmbed(**kwargs).to(device)
    _share(ours, theirs)
    assert (ours.grid_size, ours.num_patches) == (theirs.grid_size, theirs.num_patches)
    images = torch.randn(2, 2, 16, 24, device=device)
    upstream = torch.randn(2, 12, 20, device=device)
    actual = _results(ours, images, upstream)
    with summed_alike(images):
        yardstick = _results(theirs, images, upstream)
    truth = _results(copy.deepcopy(theirs).double(), images.double(), upstream.double())
    for key in truth:
        verdict = check(key, actual[key], yardstick[key], truth[key])
        assert verdict.passed, f"{key}: {verdict.detail}"


@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_drop_path_draws_the_masks_of_timm(scale_by_keep):
    x = torch.randn(64, 3, 5)
    ours, theirs = layers.DropPath(0.3, scale_by_keep), timm.layers.DropPath(0.3, scale_by_keep)
    outputs = []
    for module in (ours, theirs):
        torch.manual_seed(7)
        outputs.append(module(x))
    assert torch.equal(*outputs)
    dropped = (outputs[0] == 0).all(dim=(1, 2))
    assert 0 < dropped.sum() < 64
    assert ours.eval()(x) is x


def test_drop_path_of_everything_gives_zeros():
    assert not layers.DropPath(1.0)(torch.randn(4, 3)).any()


def test_patch_dropout_keeps_the_patches_of_timm():
    x = torch.randn(4, 12, 5)
    outputs = []
    for module in (layers.PatchDropout(0.4, 2), timm.layers.PatchDropout(0.4, 2)):
        torch.manual_seed(7)
        outputs.append(module(x))
    assert outputs[0].shape == (4, 8, 5)
    assert torch.equal(*outputs)
    assert layers.PatchDropout(0.4, 2).eval()(x) is x


@pytest.mark.parametrize("init_values", [None, 0.5])
def test_block_in_training_draws_the_drop_paths_of_timm(init_values, device, computed_by_pytorch):
    kwargs = {"qkv_bias": True, "init_values": init_values, "drop_path": 0.5}
    ours, theirs = layers.Block(C, H, **kwargs).to(device), TimmBlock(C, H, **kwargs).to(device)
    _share(ours, theirs)
    x = torch.randn(3, 5, C, device=device)
    upstream = torch.randn_like(x)
    results = []
    for module, training in ((ours, True), (theirs, True), (theirs, False)):
        module.train(training)
        torch.manual_seed(7)
        results.append(_results(module, x, upstream))
    for key in results[0]:
        torch.testing.assert_close(results[0][key], results[1][key], rtol=1e-4, atol=1e-4, msg=key)
    changed = (results[0]["output"] - results[2]["output"]).abs().amax(dim=(1, 2))
    assert (changed > 0.01).any()


def test_dropout_after_the_projections_draws_as_timm():
    ours, theirs = layers.Block(C, H, proj_drop=0.3), TimmBlock(C, H, proj_drop=0.3)
    _share(ours, theirs)
    x = torch.randn(2, 5, C)
    outputs = []
    with vitkernels.use_backend("torch"):
        for module in (ours, theirs):
            torch.manual_seed(7)
            outputs.append(module(x))
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(outputs[0], ours.eval()(x), atol=1e-2)


@pytest.mark.parametrize("adapted", [False, True], ids=["fused", "unfused"])
def test_attention_dropout_is_that_of_its_seed(adapted, device):
    """What the kernels drop is known to the last bit, so that the output and the gradients are, too."""
    attn = layers.Attention(C, H, attn_drop=0.4).to(device)
    if adapted:
        attn.qkv.register_forward_hook(lambda *_: None)
    assert attn.fuses() != adapted
    x = torch.randn(2, 5, C, device=device)
    upstream = torch.randn_like(x)
    torch.manual_seed(7)
    drawn = torch.randint(2**62, (1,), device=device)
    torch.manual_seed(7)
    actual = _results(attn, x, upstream)
    scale = reference.dropout_scale(int(drawn), (2, H, 5, 5), 0.4).to(device)
    assert 0.2 < (scale == 0).double().mean() < 0.6

    def expected(attn, x):
        q, k, v = (y.transpose(1, 2) for y in attn.qkv(x).unflatten(-1, (3, H, C // H)).unbind(2))
        return attn.proj(reference.attention(q, k, v, dropout_scale=scale).transpose(1, 2).flatten(2))

    with summed_alike(x):
        yardstick = _results(attn, x, upstream, expected)
    truth = _results(copy.deepcopy(attn).double(), x.double(), upstream.double(), expected)
    verdicts = [check(name, actual[name], yardstick[name], truth[name]) for name in truth]
    assert all(v.passed for v in verdicts), [v.detail for v in verdicts]


def test_attention_dropout_drops_in_training_alone_and_what_it_keeps_makes_up_for_it(backend, device):
    block, plain = layers.Block(C, H, attn_drop=0.4).to(device), layers.Block(C, H).to(device)
    plain.load_state_dict(block.state_dict())
    x = torch.randn(2, 5, C, device=device)
    with torch.no_grad():
        assert torch.equal(block.eval()(x), plain.eval()(x))
        block.train()
        assert not torch.allclose(block(x), plain(x), atol=1e-3)
        attn = block.attn
        undropped, dropped = plain.attn(x)[:1], attn(x[:1].expand(64, -1, -1))
    deviation = dropped.std(0) / len(dropped) ** 0.5
    assert ((dropped.mean(0) - undropped) / deviation).square().mean() < 2.0


def test_norms_of_queries_and_keys_count_beside_a_hook():
    attn = layers.Attention(C, num_heads=H, qk_norm=True)
    x = torch.randn(2, 5, C)
    with torch.no_grad():
        for parameter in (attn.q_norm.weight, attn.k_norm.bias):
            parameter.add_(torch.randn_like(parameter))
        expected = attn(x)
        for path in ("qkv", "k_norm", "attn_drop"):
            handle = attn.get_submodule(path).register_forward_hook(lambda *_: None)
            assert not attn.fuses()
            torch.testing.assert_close(attn(x), expected, rtol=1e-4, atol=1e-5)
            handle.remove()


def test_whoever_hooks_onto_attention_dropout_sees_the_weights():
    attn, x, seen = layers.Attention(C, H, attn_drop=0.4).eval(), torch.randn(2, 5, C), []
    with vitkernels.use_backend("torch"):
        expected = attn(x)
        attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
        torch.testing.assert_close(attn(x), expected, rtol=1e-5, atol=1e-6)
    assert seen[0].shape == (2, H, 5, 5)
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(2, H, 5))


class _Adapted(nn.Linear):
    """What an adapter library puts in a Linear's place."""

    def forward(self, x):
        return super().forward(x) + 1.0


@pytest.mark.parametrize("path", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_an_adapter_in_place_of_a_linear_is_not_bypassed(path):
    ours, theirs = layers.Block(C, H, init_values=0.5).eval(), TimmBlock(C, H, init_values=0.5).eval()
    _share(ours, theirs)
    x = torch.randn(2, 5, C)
    with vitkernels.use_backend("torch"):
        before = ours(x)
        for block in (ours, theirs):
            old = block.get_submodule(path)
            adapted = _Adapted(old.in_features, old.out_features, bias=old.bias is not None)
            adapted.load_state_dict(old.state_dict())
            block.set_submodule(path, adapted)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(ours(x), before, atol=1e-2)


@pytest.mark.parametrize(
    "path", ["norm1", "attn", "attn.qkv", "attn.attn_drop", "attn.proj_drop", "ls1", "norm2", "mlp", "mlp.act"]
)
def test_a_hook_on_a_child_of_a_block_runs(path):
    block = layers.Block(C, H, init_values=0.5).eval()
    x = torch.randn(2, 5, C)
    with vitkernels.use_backend("torch"):
        before, seen = block(x), []
        handle = block.get_submodule(path).register_forward_hook(lambda module, inputs, output: seen.append(output))
        torch.testing.assert_close(block(x), before, rtol=1e-5, atol=1e-5)
        assert len(seen) == 1
        handle.remove()
        block(x)
        assert len(seen) == 1


def test_the_activation_may_be_named_or_given():
    given = {
        "gelu": nn.GELU,
        "gelu_tanh": timm.layers.activations.GELUTanh,
        "quick_gelu": timm.layers.activations.QuickGELU,
        "silu": nn.SiLU,
    }
    x = torch.randn(50)
    for name, cls in given.items():
        assert torch.equal(layers.create_activation(name)(x), layers.create_activation(cls)(x))
        torch.testing.assert_close(layers.create_activation(name)(x), cls()(x))
    assert repr(layers.create_activation(None)) == repr(nn.GELU())


@pytest.mark.parametrize(("new", "old", "prefix"), [((5, 7), (4, 4), 1), ((3, 3), (4, 6), 0), ((4, 4), (4, 4), 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resampled_position_embedding_equals_timms(new, old, prefix, dtype):
    pos_embed = torch.randn(1, prefix + old[0] * old[1], 6).to(dtype)
    expected = timm.layers.resample_abs_pos_embed(pos_embed, list(new), list(old), prefix)
    actual = layers.resample_pos_embed(pos_embed, new, old, prefix)
    assert actual.dtype == dtype and actual.shape == (1, prefix + new[0] * new[1], 6)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resampling_to_the_same_grid_changes_no_bit(dtype, monkeypatch):
    """An exported program resamples at every size, its own too, and is to give there what the model gives."""
    pos_embed = torch.randn(1, 2 + 35, 6).to(dtype)
    assert layers.resample_pos_embed(pos_embed, (5, 7), (5, 7), 2) is pos_embed
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    resampled = layers.resample_pos_embed(pos_embed, (5, 7), (5, 7), 2)
    assert resampled is not pos_embed
    assert torch.equal(resampled, pos_embed)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: layers.Attention(48, num_heads=5), ValueError, "num_heads 5 does not divide dim 48"),
        (lambda: layers.Attention(48, num_heads=3, attn_drop=1.1), ValueError, "probability has to be between 0 and 1"),
        (lambda: layers.DropPath(-0.1), ValueError, "drop_prob is -0.1"),
        (lambda: layers.PatchDropout(1.0), ValueError, "prob is 1.0"),
        (lambda: layers.PatchEmbed(20, 8), ValueError, "20×20 pixels does not divide into patches of 8×8"),
        (lambda: layers.Mlp(48, act_layer="relu"), ValueError, "unknown act_layer 'relu'"),
        (lambda: layers.Mlp(48, act_layer=nn.ReLU), NotImplementedError, "ReLU"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_block_leaves_attention_to_whom_the_table_says(monkeypatch, device):
    from vitkernels.layers import fused

    block = layers.Block(C, H).to(device)
    x = torch.randn(2, 5, C, device=device)
    expected = block(x)
    calls = []
    monkeypatch.setattr(fused.ops, "block", lambda *a, **k: calls.append("block"))
    monkeypatch.setattr(fused.ops, "attention_provider", lambda *a: "sdpa")
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    assert not calls
