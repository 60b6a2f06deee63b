"""Every kernel with its programs and warps in another order: outputs and gradients are the same bits.

A program that reads what another of the same launch writes, or two that write one element, would show. A GPU orders
programs as it likes; there reruns are compared instead (tests/ops).
"""

import pytest
import torch
from calls import OPS, Call, Input

from vitkernels.emulator.launch import EmulationError, emulating


def heads(*shape: int) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(("q", "k", "v"), shape)


def of(op: str, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16, **options) -> Call:
    return Call(op, dtype, {name: Input(shape, grad=True) for name, shape in shapes.items()}, options)


NORM = {"x": (150, 40), "weight": (40,)}
SUM = {**NORM, "x": (3, 50, 40), "residual": (3, 50, 40), "layer_scale": (40,)}
EPILOGUE = {"residual": (150, 140), "layer_scale": (140,)}
CALLS = {
    "layer_norm in chunks": of("layer_norm", {"x": (9, 8200), "weight": (8200,), "bias": (8200,)}),
    "add_layer_norm": of("add_layer_norm", {**SUM, "bias": (40,)}),
    "linear": of(
        "linear", {"x": (150, 30), "weight": (140, 30), "bias": (140,), **EPILOGUE}, torch.float32, activation="gelu"
    ),
    "mlp": of(
        "mlp",
        {"x": (150, 30), "w1": (150, 30), "b1": (150,), "w2": (140, 150), "b2": (140,), **EPILOGUE},
        recompute=True,
    ),
    "swiglu_mlp": of("swiglu_mlp", {"x": (150, 30), "w12": (300, 30), "b12": (300,), "w3": (140, 150), "b3": (140,)}),
    "attention by rows": of("attention", {**heads(2, 2, 70, 16), "attn_mask": (2, 70, 70)}),
    "attention by windows": of("attention", {**heads(9, 2, 17, 16), "attn_mask": (2, 17, 17)}),
    "attention by blocks": of("attention", heads(1, 2, 270, 16), is_causal=True, dropout_p=0.2),
    "attention_qkvpacked": of(
        "attention_qkvpacked",
        {"qkv": (2, 70, 3, 2, 24), "q_weight": (24,), "cos": (69, 24), "sin": (69, 24)},
        q_kind="rms", q_eps=1e-6, interleaved=False, num_prefix_tokens=1,
    ),
    "attention_varlen": of("attention_varlen", heads(90, 2, 16), starts=(0, 17, 17, 85), max_seqlen=68),
    "patch_embed": of(
        "patch_embed",
        {
            "images": (3, 3, 32, 28), "weight": (140, 3, 4, 4), "bias": (140,), "prefix_tokens": (1, 2, 140),
            "pos_embed": (1, 58, 140),
        },
    ),
}  # fmt: skip


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU orders programs as it likes; see tests/ops")


@pytest.mark.parametrize("name", CALLS)
def test_programs_in_any_order_agree_bit_for_bit(name):
    call = CALLS[name]
    tensors, upstream = call.draw(0, torch.device("cpu"))
    gradients = None

    def run():
        nonlocal gradients
        torch.manual_seed(0)
        outputs = OPS[call.op].function(**tensors, **call.options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = gradients or [upstream(o) for o in outputs]
        return *outputs, *torch.autograd.grad(outputs, list(tensors.values()), gradients)

    ordered = run()
    with emulating(seed=1, runs=[]) as emulation:
        shuffled = run()
    assert emulation.runs
    if " by " in name:
        assert any(f"_{name.split()[-1].rstrip('s')}" in r.kernel for r in emulation.runs), "by another kernel"
    for a, b in zip(ordered, shuffled, strict=True):
        assert torch.equal(a, b)


def test_a_race_would_show():
    """What all of this rests on: a kernel whose last program wins gives another result in another order."""
    import racing_kernel

    def run(**options):
        out = torch.zeros(1)
        with emulating(**options) as emulation:
            racing_kernel.last_one_wins[(8,)](out)
        return out, emulation.runs

    with pytest.raises(EmulationError, match="two programs write the same bytes"):
        run()
    ordered, _ = run(raises=False)
    assert any(not torch.equal(run(raises=False, seed=seed)[0], ordered) for seed in range(1, 5))
