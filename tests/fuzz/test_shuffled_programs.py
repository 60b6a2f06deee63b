"""Every op with its programs in another order, which the interpreter allows: outputs and gradients are the same bits.

A program that reads what another of the same launch writes, or two that write one element, would show. A GPU orders
programs as it likes; there reruns are compared instead (tests/ops).
"""

import random

import pytest
import torch
from calls import OPS, Call, Input


def heads(*shape: int) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(("q", "k", "v"), shape)


BLOCK = {
    "x": (3, 20, 48),
    **{f"norm{i}_{part}": (48,) for i in (1, 2) for part in ("weight", "bias")},
    "qkv_weight": (144, 48),
    "proj_weight": (48, 48),
    "proj_bias": (48,),
    "fc1_weight": (150, 48),
    "fc1_bias": (150,),
    "fc2_weight": (48, 150),
    "fc2_bias": (48,),
    "gamma1": (48,),
    "gamma2": (48,),
}


def of(op: str, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, **options) -> Call:
    return Call(op, dtype, {name: Input(shape, grad=True) for name, shape in shapes.items()}, options)


NORM = {"x": (150, 40), "weight": (40,)}
SUM = {**NORM, "x": (3, 50, 40), "residual": (3, 50, 40), "layer_scale": (40,)}
EPILOGUE = {"residual": (150, 140), "layer_scale": (140,)}
CALLS = {
    "layer_norm": of("layer_norm", {**NORM, "bias": (40,)}),
    "layer_norm in chunks": of("layer_norm", {"x": (9, 8200), "weight": (8200,), "bias": (8200,)}, torch.bfloat16),
    "rms_norm": of("rms_norm", NORM),
    "add_layer_norm": of("add_layer_norm", {**SUM, "bias": (40,)}),
    "add_rms_norm": of("add_rms_norm", SUM),
    "linear": of("linear", {"x": (150, 30), "weight": (140, 30), "bias": (140,), **EPILOGUE}, activation="gelu"),
    "mlp": of(
        "mlp",
        {"x": (150, 30), "w1": (150, 30), "b1": (150,), "w2": (140, 150), "b2": (140,), **EPILOGUE},
        recompute=True,
    ),
    "swiglu_mlp": of("swiglu_mlp", {"x": (150, 30), "w12": (300, 30), "b12": (300,), "w3": (140, 150), "b3": (140,)}),
    "swiglu_mlp with a norm": of(
        "swiglu_mlp",
        {"x": (150, 30), "gate": (150, 30), "value": (150, 30), "w3": (140, 150), "b3": (140,), "norm_weight": (150,)},
        eps=1e-6,
    ),
    "attention by rows": of("attention", {**heads(2, 2, 70, 16), "attn_mask": (2, 70, 70)}),
    "attention by windows": of("attention", {**heads(9, 2, 17, 16), "attn_mask": (2, 17, 17)}),
    "attention by blocks": of("attention", heads(1, 2, 70, 136), is_causal=True, dropout_p=0.2),
    "attention_qkvpacked": of(
        "attention_qkvpacked",
        {"qkv": (2, 70, 3, 2, 24), "q_weight": (24,), "cos": (69, 24), "sin": (69, 24)},
        q_kind="rms", q_eps=1e-6, interleaved=False, num_prefix_tokens=1,
    ),
    "attention_varlen": of("attention_varlen", heads(90, 2, 16), starts=(0, 17, 17, 85), max_seqlen=68),
    "block": of("block", BLOCK, num_heads=3),
    "patch_embed": of(
        "patch_embed",
        {
            "images": (3, 3, 32, 28), "weight": (140, 3, 4, 4), "bias": (140,), "prefix_tokens": (1, 2, 140),
            "pos_embed": (1, 58, 140),
        },
    ),
}  # fmt: skip


@pytest.fixture
def programs(monkeypatch):
    """The numbers of the programs of each launch as they run; ``programs.shuffle = True`` shuffles them."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if torch.cuda.is_available():
        pytest.skip("a GPU orders programs as it likes; tests/ops compares reruns there")
    builder = interpreter.interpreter_builder
    set_grid_idx = builder.set_grid_idx

    class Programs(list):
        shuffle = False

    seen = Programs()

    def in_another_order(x, y, z):
        if x == 0:
            seen.append([])
        count = builder.grid_dim[0]
        order = random.Random(count).sample(range(count), count) if count > 3 else range(count)[::-1]
        seen[-1].append(order[x] if seen.shuffle else x)
        set_grid_idx(seen[-1][-1], y, z)

    monkeypatch.setattr(builder, "set_grid_idx", in_another_order)
    return seen


@pytest.mark.parametrize("name", CALLS)
def test_programs_in_any_order_agree_bit_for_bit(name, programs):
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
    count, programs.shuffle = len(programs), True
    shuffled = run()
    assert len(programs) == 2 * count
    for before, after in zip(programs[:count], programs[count:], strict=True):
        assert sorted(after) == before
    assert any(after != before for before, after in zip(programs[:count], programs[count:], strict=True))
    for a, b in zip(ordered, shuffled, strict=True):
        assert torch.equal(a, b)


def test_a_race_would_show(programs):
    """What all of this rests on: a kernel whose last program wins gives another result in another order."""
    triton = pytest.importorskip("triton")

    import racing_kernel

    def run():
        out = torch.zeros(1)
        racing_kernel.last_one_wins[(8,)](out)
        return out

    assert isinstance(racing_kernel.last_one_wins, triton.runtime.interpreter.InterpretedFunction)
    ordered = run()
    programs.shuffle = True
    assert not torch.equal(run(), ordered)
