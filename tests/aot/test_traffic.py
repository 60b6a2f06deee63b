"""The counter of passes over the activations, held against arithmetic done by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vitkernels.tools.aot.traffic import count

B, N, C = 3, 5, 8
EXACT = 1e-9


def weights(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)


def rows(traffic):
    return [(r.op, r.reads, r.writes, r.least, r.fixed) for r in traffic.rows]


# Per op: reads, writes, least in passes; elements that do not grow with the batch.
BY_HAND = {
    "a sum with a constant": (lambda x: x + 1, [("add", 1, 1, 0, 0)]),
    "two operands": (lambda x: x + torch.empty_like(x), [("add", 2, 1, 0, 0)]),
    "one operand twice": (lambda x: x * x, [("mul", 1, 1, 0, 0)]),
    "one operand and its transpose": (lambda x: x @ x.mT, [("bmm", 1, N / C, 1 + N / C, 0)]),
    "two halves of one tensor": (lambda x: x[..., :4] * x[..., 4:], [("mul", 1, 0.5, 0, 0)]),
    "views": (lambda x: x.view(-1, C).t().unsqueeze(0).detach(), []),
    "a reshape that need not copy": (lambda x: x.reshape(-1).contiguous(), []),
    "a reshape that must": (lambda x: x.mT.reshape(-1), [("clone", 1, 1, 0, 0)]),
    "a statistic, broadcast": (
        lambda x: x - x.mean(-1, keepdim=True),
        [("mean", 1, 1 / C, 0, 0), ("sub", 1 + 1 / C, 1, 0, 0)],
    ),
    "an expanded input": (
        lambda x: torch.mul(x, x[:, :1].expand_as(x) + 0),
        [("add", 1 / N, 1, 0, 0), ("mul", 2, 1, 0, 0)],
    ),
    "in place": (lambda x: torch.zeros_like(x).add_(x), [("zeros_like", 0, 1, 0, 0), ("add_", 2, 1, 0, 0)]),
    "a copy": (lambda x: torch.empty_like(x).copy_(x), [("copy_", 1, 1, 0, 0)]),
    "a parameter": (lambda x: x + weights(N, C), [("add", 1, 1, 0, N * C)]),
    "what holds parameters alone": (lambda x: (weights(C) * weights(C)).sum() + x.view(-1)[:0], [
        ("mul", 0, 0, 0, 3 * C), ("sum", 0, 0, 0, C + 1), ("add", 0, 0, 0, 1)]),
    "LayerNorm": (
        lambda x: F.layer_norm(x, (C,), weights(C), weights(C)),
        [("native_layer_norm", 1, 1 + 2 / C, 0, 2 * C)],
    ),
    "a product": (lambda x: F.linear(x, weights(3 * C, C)), [("mm", 1, 3, 4, 3 * C * C)]),
    "a product and its bias": (
        lambda x: F.linear(x, weights(3 * C, C), weights(3 * C)),
        [("addmm", 1, 3, 4, 3 * C * C + 3 * C)],
    ),
    "a product onto a residual": (
        lambda x: torch.addmm(torch.empty_like(x).view(-1, C), x.view(-1, C), weights(C, C)),
        [("addmm", 2, 1, 2, C * C)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_an_op(name):
    function, expected = BY_HAND[name]
    found = rows(count(function, (B, N, C)))
    assert [row[0] for row in found] == [row[0] for row in expected]
    for row, by_hand in zip(found, expected, strict=True):
        assert row[1:] == pytest.approx(by_hand[1:], abs=EXACT)


def test_an_op_made_of_others():
    def below_autograd(x):
        with torch.inference_mode():
            return x.matmul(weights(C, C)).clone()

    assert rows(count(below_autograd, (B, N, C))) == [("mm", 1, 1, 2, C * C), ("clone", 1, 1, 0, 0)]


def test_the_gradient_of_a_product():
    w, b = weights(3 * C, C), weights(3 * C)
    traffic = count(lambda x: F.linear(x, w, b), (B, N, C), parameters=(w, b), train=True)
    backward = [row[1:] for row in rows(traffic) if row[0] != "addmm"]
    dx = (3, 1, 4, 3 * C * C)
    dw = (3 + 1, 0, 4, 3 * C * C)
    db = (3, 0, 0, 3 * C)
    for row, by_hand in zip(sorted(backward), sorted([dx, dw, db]), strict=True):
        assert row == pytest.approx(by_hand, abs=EXACT)
    assert traffic.total("extra", phase="backward") == pytest.approx(3)
    assert traffic.total("extra", phase="forward") == 0


@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_pytorch(masked):
    N, D = 64, 16
    mask = torch.empty(N, N, dtype=torch.bfloat16, device="meta") if masked else None

    def attention(x):
        q, k, v = x.unbind(2)
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask)

    # x is qkv, so that q, k, v and o are a third of a pass each.
    traffic = count(attention, (2, N, 3, 2, D), train=True)
    forward, backward = (
        next(r for r in traffic.rows if r.attention and r.phase == phase) for phase in ("forward", "backward")
    )
    assert forward.reads == pytest.approx(1)
    assert forward.least == pytest.approx(4 / 3)
    assert backward.least == pytest.approx(8 / 3)
    # The log-sum-exp: a number a row and head.
    assert (forward.extra, backward.extra) == pytest.approx((1 / D / 3, 1 / D / 3))
    # The three gradients are packed into one.
    assert [(r.reads, r.writes) for r in traffic.rows if r.op == "stack"] == [(pytest.approx(1), pytest.approx(1))]


def test_other_ops_at_another_batch():
    with pytest.raises(RuntimeError, match=f"other ops run at batch {B + 1} than at {B}"):
        count(lambda x: x + 1 if x.shape[0] == B else x * 2, (B, N, C))


# In a process of its own, as it replaces PyTorch's functions. conftest makes torchvision importable for timm.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
import vitkernels.ops as ops
from vitkernels.tools.aot.traffic import PROVIDERS, count, run_traffic
out, tests, *models = sys.argv[1:]
sys.path.insert(0, tests)
import conftest

def weights(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)

C, F = 64, 256
w, b, w1, b1, w2, gamma = weights(C), weights(C), weights(F, C), weights(F), weights(C, F), weights(C)
qkv_w, qkv_b = weights(3 * C, C), weights(3 * C)
functions = {
    "layer_norm": (lambda x: ops.layer_norm(x, w.detach(), b.detach()), ()),
    "layer_norm, its parameters too": (lambda x: ops.layer_norm(x, w, b), (w, b)),
    "add_layer_norm": (lambda x: sum(ops.add_layer_norm(x, x.detach() + 0, w, b, layer_scale=gamma)), ()),
    "linear": (lambda x: ops.linear(x, qkv_w, qkv_b), (qkv_w, qkv_b)),
    "linear and residual": (lambda x: ops.linear(x, w1[:C], b, residual=x.detach() + 0, layer_scale=gamma), ()),
    "mlp": (lambda x: ops.mlp(x, w1, b1, w2, b), (w1, b1, w2, b)),
    "attention": (lambda x: ops.attention_qkvpacked(x.view(*x.shape[:2], 3, 1, C // 3)), ()),
}
width = {"attention": C // 3 * 3}
counted = {
    name: count(f, (64, 128, width.get(name, C)), parameters=p, train=True).to_dict()
    for name, (f, p) in functions.items()
}
for model in models:  # Inductor takes seconds a model
    providers = [p for p in PROVIDERS if p != "torch.compile" or "dinov2" not in model]
    counted[model] = run_traffic(model, providers=providers)
Path(out).write_text(json.dumps(counted))
"""
PLAIN = "vit_base_patch16_224"
LAYER_SCALE = ("vit_base_patch14_dinov2", "deit3_base_patch16_224")
MODELS = (PLAIN, *LAYER_SCALE)
SWIN = "swin_tiny_patch4_window7_224"
MOST_IN_INFERENCE = 8
MOST_IN_TRAINING = 24
# At 518 pixels a row of 1,370 keys is no program's: dkv reads again what dq has read, q, k, v and do.
LONG_ROWS, AGAIN = ("vit_base_patch14_dinov2",), 4
WIDTH, HEADS = 768, 12


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    pytest.importorskip("timm")
    out = tmp_path_factory.mktemp("traffic") / "counted.json"
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, out, Path(__file__).parents[1], *MODELS, SWIN],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(out.read_text()) | {"printed": run.stdout}


def test_layer_norm_kernels(counted):
    forward, backward = counted["layer_norm"]["rows"]
    C = 64
    # x; y, mean and rstd. Neither the residual's pointer nor those of the shares is used: placeholders stand there.
    assert (forward["reads"], forward["writes"]) == pytest.approx((1, 1 + 2 / C))
    assert (backward["reads"], backward["writes"]) == pytest.approx((2 + 2 / C, 1))
    assert forward["least"] == backward["least"] == 0

    _, backward, *sums = counted["layer_norm, its parameters too"]["rows"]
    assert (backward["reads"], backward["writes"]) == pytest.approx((2 + 2 / C, 1))
    # The partial sums do not grow with the batch: as many are summed as were written.
    assert backward["fixed"] > C
    assert (
        sum(row["fixed"] for row in sums if row["op"].endswith("_sum_shares_kernel")) == backward["fixed"] - C + 2 * C
    )


def test_add_layer_norm_kernels(counted):
    forward = next(r for r in counted["add_layer_norm"]["rows"] if r["op"].startswith("layer_norm_fwd"))
    # x and the residual; the normed, the sum and the statistics.
    assert (forward["reads"], forward["writes"]) == pytest.approx((2, 2 + 2 / 64))


def test_linear_kernels(counted):
    traffic = counted["linear"]
    forward = traffic["rows"][0]
    assert (forward["reads"], forward["writes"], forward["extra"]) == pytest.approx((1, 3, 0))
    # dx, dW; db is the only one that costs more.
    assert traffic["least"] == pytest.approx(4 + 4 + 4)
    assert traffic["extra"] == pytest.approx(3)

    forward = next(r for r in counted["linear and residual"]["rows"] if r["op"].startswith("linear_fwd"))
    assert (forward["reads"], forward["writes"], forward["least"]) == pytest.approx((2, 1, 2))


def test_mlp_kernels(counted):
    # fc1, fc2; their gradients by their input and by their weight: all of one pass on one side and four on the other.
    assert counted["mlp"]["least"] == pytest.approx(6 * 5)


def test_attention_kernels(counted):
    # x is qkv: q, k, v, o and their gradients are a third of a pass.
    traffic = counted["attention"]
    assert traffic["least"] == pytest.approx(4 / 3 + 8 / 3)
    assert traffic["extra"] == pytest.approx(traffic["extra_of_attention"])
    assert traffic["extra"] > 0


# By hand, in passes. Norms read x and write y. GELU does at four times the width. A residual sum takes two and gives
# one; LayerScale takes one and gives one.
TIMM_FORWARD = 2 * (1 + 1) + (4 + 4) + 2 * (2 + 1)
TIMM_FORWARD_LAYER_SCALE = 2 * (1 + 1)
# Norms read dy and x and write dx. GELU so at four times the width. Biases sum the gradient of fc2's, fc1's, proj's
# and qkv's outputs. At both residuals two gradients are added. The gradients of q, k and v are stacked and then copied
# into qkv's layout. The roofline's 37 (55 with the forward) leaves those 12 passes out, and takes LayerNorm's backward
# for two kernels that each read dy and x, which are 4 more: 45 - 12 + 4.
TIMM_BACKWARD = 2 * (2 + 1) + (8 + 4) + (1 + 4 + 1 + 3) + 2 * (2 + 1) + 2 * (3 + 3)
# dx = γ · dy; dγ = Σ (dy · x), of which the product is written and read again.
TIMM_BACKWARD_LAYER_SCALE = 2 * ((1 + 1) + (2 + 1) + 1)
# Two norms' mean and rstd, and attention's log-sum-exp, are written forward and read backward.
STATISTICS = (2 * 2 + HEADS) / WIDTH
# qkv, proj, fc1, fc2 and attention.
LEAST_FORWARD = (1 + 3) + (1 + 1) + (1 + 4) + (4 + 1) + (3 + 1)
LEAST_BACKWARD = 2 * ((1 + 3) + (1 + 1) + (1 + 4) + (4 + 1)) + (5 + 3)


def test_the_roofline_of_timm():
    assert TIMM_FORWARD == 18
    assert TIMM_FORWARD + TIMM_FORWARD_LAYER_SCALE == 22
    assert TIMM_FORWARD + TIMM_BACKWARD - 12 + 4 == 55


@pytest.mark.parametrize("model", MODELS)
def test_a_block_of_timm(counted, model):
    forward, backward = TIMM_FORWARD + STATISTICS, TIMM_BACKWARD + STATISTICS
    if model in LAYER_SCALE:
        forward += TIMM_FORWARD_LAYER_SCALE
        backward += TIMM_BACKWARD_LAYER_SCALE
    inference, training = counted[model]["inference"]["timm"], counted[model]["training"]["timm"]
    assert inference["extra"] == pytest.approx(forward)
    assert inference["least"] == pytest.approx(LEAST_FORWARD)
    assert training["extra"] == pytest.approx(forward + backward)
    assert training["least"] == pytest.approx(LEAST_FORWARD + LEAST_BACKWARD)


# Compiled, each residual sum and its LayerScale are fused with the norm that follows, and are not written: the last sum
# reads three operands.
COMPILED_FORWARD = (1 + 1) + (2 + 1) + (4 + 4) + (3 + 1)
# GELU; the biases; the first norm's input, which reads dy, x and the gradient past the branch, and the second's, which
# reads the first branch as well; both norms' parameters, from x, that branch and two dy; the stacked gradients of qkv.
COMPILED_BACKWARD = (8 + 4) + (1 + 4 + 1 + 3) + (3 + 1) + (4 + 1) + 4 + (3 + 3)


@pytest.mark.parametrize("model", [PLAIN, "deit3_base_patch16_224"])
def test_a_compiled_block(counted, model):
    inference, training = (counted[model][kind]["torch.compile"] for kind in ("inference", "training"))
    assert inference["extra"] == pytest.approx(COMPILED_FORWARD)
    assert inference["least"] == pytest.approx(LEAST_FORWARD)
    # Statistics in fp32 count twice; parts of sums are written and read.
    assert training["least"] == pytest.approx(LEAST_FORWARD + LEAST_BACKWARD, abs=0.1)
    if model == PLAIN:
        assert training["extra"] == pytest.approx(COMPILED_FORWARD + COMPILED_BACKWARD, abs=0.3)
    ours, timms = (counted[model]["training"][provider]["extra"] for provider in ("vitkernels", "timm"))
    assert ours < training["extra"] < timms


@pytest.mark.parametrize("model", MODELS)
def test_a_block_of_ours(counted, model):
    inference, training = counted[model]["inference"]["vitkernels"], counted[model]["training"]["vitkernels"]
    # The same products and attention as timm's, kernel by kernel.
    assert inference["least"] == pytest.approx(LEAST_FORWARD)
    # Where a program sees whole rows, attention's backward needs no o.
    assert training["least"] == pytest.approx(LEAST_FORWARD + LEAST_BACKWARD - (model not in LONG_ROWS))
    assert not any("native_layer_norm" in row["op"] for row in training["rows"])
    assert 0 < inference["extra"] <= MOST_IN_INFERENCE
    # Op by op, from what enters and leaves each; ours are counted kernel by kernel.
    again = AGAIN if model in LONG_ROWS else 0
    assert again <= training["extra_of_attention"] < again + 0.2
    assert 0 < training["extra"] - again <= MOST_IN_TRAINING


# Of a stage's two blocks the second is shifted. Each norms twice, pads, cuts windows, scales q, copies q, k and v for
# products, adds the bias, takes the softmax, copies o, joins windows, adds two residuals and has GELU. Scores are 49 a
# query and head of 32 channels: a product writes them, the bias reads and writes them, so does the softmax, and a
# product reads them. The second block rolls twice, and adds a mask to the scores.
SCORES = 49 / 32
TIMM_STAGE = 2 * (4 + 2 + 2 + 2 + 6 + (1 + 2 + 2 + 1) * SCORES + 2 + 2 + 6 + 8) + 2 * 2 + 2 * SCORES
MOVES = {"roll", "constant_pad_nd", "clone", "_softmax"}
OURS = {
    "_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel", "_product_kernel", "_product_dact_kernel", "addmm", "mm", "sum",
    "_window_attention_fwd_kernel", "_window_attention_bwd_whole_kernel", "_sum_shares_kernel",
}  # fmt: skip


def test_a_stage_of_swin(counted):
    inference, training = counted[SWIN]["inference"], counted[SWIN]["training"]
    assert inference["timm"]["extra"] == pytest.approx(TIMM_STAGE + 2 * 2 * 2 / 96)
    for provider in ("timm", "torch.compile"):
        assert inference[provider]["least"] == pytest.approx(2 * LEAST_FORWARD)
        assert training[provider]["least"] == pytest.approx(2 * (LEAST_FORWARD + LEAST_BACKWARD), abs=0.1)
    assert {row["op"] for row in inference["timm"]["rows"]} >= MOVES
    for found, more in ((inference, set()), (training, {"add"})):  # of two gradients of a residual
        # No pass for rolling, padding, cutting windows, masks or biases.
        ops = {r["op"].rpartition(": ")[2] for r in found["vitkernels"]["rows"] if r["reads"] or r["writes"]}
        assert ops <= OURS | more
        assert found["vitkernels"]["extra"] < found["torch.compile"]["extra"] < found["timm"]["extra"]
    assert inference["vitkernels"]["least"] == pytest.approx(2 * LEAST_FORWARD)
    assert inference["vitkernels"]["extra"] <= 2 * MOST_IN_INFERENCE


def test_what_is_printed(counted):
    for model in MODELS:
        assert f"{model}, a block of timm, inference, batch 32" in counted["printed"]
    assert (
        "Beyond what products and attention need, training: timm 63.0, torch.compile 57.2, vitkernels"
        in counted["printed"]
    )
    assert "_layer_norm_fwd_kernel" in counted["printed"]
