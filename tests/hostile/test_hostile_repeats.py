"""A call like one before repeats its launches without the launcher: where nobody can tell, whatever came since.

Each op's answer is held against the same call with nothing remembered: the same bits, or the same error.
"""

import contextlib
import functools
import gc
import itertools
import threading
import weakref

import pytest
import torch
import triton
from op_calls import call, each_op, needs_gpu
from test_hostile_layouts import every_other, expanded, lazily_negated, off_by_one_element, transposed
from torch.utils._python_dispatch import TorchDispatchMode

import vitkernels
from vitkernels.emulator.launch import emulating
from vitkernels.ops import _plan
from vitkernels.ops._plan import Plans


@pytest.fixture
def repeats(monkeypatch):
    """The devices that plans were run on since the list was last cleared."""
    noted, stream = [], _plan.current_stream

    def noting(device):
        noted.append(device)
        return stream(device)

    monkeypatch.setattr(_plan, "current_stream", noting)
    return noted


def results(run):
    outputs = run()
    return outputs if isinstance(outputs, tuple) else (outputs,)


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(a, b, strict=True))


def anew(run):
    _plan.forget()
    return results(run)


@each_op()
@pytest.mark.parametrize("given", ["all", "least"])
def test_the_third_call_repeats_the_second(op, given, device, repeats):
    made = call(op, grad=False, device=device)
    if given == "least":
        made = made.changed(**dict.fromkeys(made.op.optional))
    want = anew(made)
    _plan.forget()
    for number in range(4):
        repeats.clear()
        assert equal(results(made), want)
        assert bool(repeats) == (number >= 2)
    other = made.map(lambda t: t * 2 + 1, [name for name, t in made.tensors.items() if t is not None])
    repeats.clear()
    repeated = results(other)
    assert repeats
    assert equal(repeated, anew(other)), "the launches are remembered, and no tensor"


def gradients(made):
    outputs = made.outputs()
    leaves = [t for t in made.tensors.values() if t is not None and t.requires_grad]
    return torch.autograd.grad(outputs, leaves, [torch.linspace(-1, 1, y.numel()).view(y.shape) for y in outputs])


@each_op()
def test_the_third_training_step_repeats_the_second(op, repeats):
    made = call(op)
    want = anew(lambda: gradients(made))
    _plan.forget()
    for number in range(4):
        repeats.clear()
        assert equal(gradients(made), want)
        assert (len(repeats) >= 2) == (number >= 2), "forward and backward"


CHANGES = {
    "other values": lambda t: t * 2 + 1,
    "another layout": transposed,
    "every other": every_other,
    "expanded": expanded,
    "unaligned": off_by_one_element,
    "lazily negated": lazily_negated,
    "a parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "fp64": torch.Tensor.double,
    "fp16": torch.Tensor.half,
    "bf16": torch.Tensor.bfloat16,
    "uint8": lambda t: t.to(torch.uint8),
    "one more": lambda t: torch.cat([t, t[:1]]),
    "none": lambda t: t[:0],
    "left out": lambda t: None,
    "zero": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype, device=t.device),
    "a subclass": lambda t: t.as_subclass(type("Mine", (torch.Tensor,), {})),
}
OPTIONS = {
    "eps": [1e-3, 1, True, 0.0],
    "scale": [0.5, 1, True],
    "is_causal": [True, 1],
    "attn_mask": [torch.ones(5, 5, dtype=torch.bool), torch.zeros(1, 2, 5, 5), torch.zeros(5, 5).expand(2, 1, 5, 5)],
    "num_heads": [1],
    "max_seqlen": [4, 99],
    "cu_seqlens": [torch.tensor([0, 5, 10]), torch.tensor([0, 3, 10], dtype=torch.int32)],
    "pos_embed_prefix": [False],
    "normalize": [((0.5,) * 3, (0.5,) * 3), ((0.5,) * 3, (0.25,) * 3)],
}


@each_op()
def test_a_key_tells_whatever_a_launch_depends_on(op, device, instead_of_launches, monkeypatch):
    """Calls that are taken for alike launch the same kernels on as many programs with the same numbers."""
    launches, by_key, repeated = [], {}, 0

    def told(x):
        return (x.dtype, x.data_ptr() % 16) if isinstance(x, torch.Tensor) else (type(x), x)

    def note(name, grid, args, kwargs):
        launches.append((name, grid, args, {key: told(value) for key, value in kwargs.items()}))

    instead_of_launches(note)
    watched = Plans.__call__

    def through_launcher(self, device, *args):
        nonlocal repeated
        first = len(launches)
        outputs = watched(self, device, *args)
        own = launches[first:]
        if not any(isinstance(x, torch.Tensor) and x.dtype is torch.float32 for x in args):
            for *_, facts in own:
                facts.pop("PRECISION", None)  # of fp32 products, and said to all
        key, _ = _plan._key(device, args)
        if key is not None:
            repeated += (self._launcher, key) in by_key
            for got, want in zip(own, by_key.setdefault((self._launcher, key), own), strict=True):
                assert got == want
        return outputs

    monkeypatch.setattr(Plans, "__call__", through_launcher)
    made = call(op, grad=False, device=device)
    runs = [functools.partial(made, **{n: change(t)}) for n, t in made.tensors.items() for change in CHANGES.values()]
    runs += [
        functools.partial(made, **{n: value.to(device) if isinstance(value, torch.Tensor) else value})
        for n, values in OPTIONS.items() for value in values
    ]  # fmt: skip
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            for run in (made, *runs):
                with contextlib.suppress(TypeError, ValueError, NotImplementedError, RuntimeError):  # no launch, no key
                    run()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert repeated > len(made.tensors), "as other values are"
    assert len(by_key) > 10


@each_op()
def test_inference_mode(op, device, repeats):
    made = call(op, grad=False, device=device)
    for _ in range(3):
        with torch.inference_mode():
            assert all(y.is_inference() for y in made.outputs())
        assert not any(y.is_inference() for y in made.outputs())
    assert repeats


def test_another_backend_and_another_gpu(repeats):
    made = call("linear", grad=False)
    for _ in range(3):
        made()
    repeats.clear()
    with vitkernels.use_backend("torch"):
        made()
    with vitkernels.use_backend("emulated:sm_80"):
        made()
    assert not repeats
    made()
    assert repeats


def test_one_tensor_twice(device, repeats):
    """What were the two in another call?"""
    x, y = torch.randn(2, 5, 16, device=device), torch.randn(2, 5, 16, device=device)
    for _ in range(4):
        doubled = vitkernels.ops.add_layer_norm(x, x)[1]
        assert torch.equal(doubled, x + x)
    assert not repeats
    for _ in range(4):
        assert torch.equal(vitkernels.ops.add_layer_norm(x, y)[1], x + y)
    assert repeats
    assert torch.equal(vitkernels.ops.add_layer_norm(x, x)[1], x + x)


def test_views_of_one_storage(device, repeats):
    halves = torch.randn(2, 2, 5, 16, device=device)
    for _ in range(4):
        assert torch.equal(vitkernels.ops.add_layer_norm(halves[0], halves[1])[1], halves[0] + halves[1])
    assert repeats


def repeated(launcher, *args):
    """What the third call gives, and the plan that it ran, or None."""
    plans = Plans(launcher)
    for _ in range(2):
        plans("here", *args)
    (plan,) = plans._plans.values()
    return plans("here", *args), plan


def test_strides_of_dims_of_size_1():
    def launcher(x):
        return x.new_empty([2, 1, 3]), torch.empty_strided((2, 1, 3), (3, 7, 1)), torch.empty_like(x)

    got, plan = repeated(launcher, torch.zeros(3, 2).t())
    assert [y.stride() for y in got] == [(3, 3, 1), (3, 7, 1), (1, 2)] and plan is not None


def many_ops(x, y, flag, sizes):
    total = torch.empty_like(x)
    total.copy_(x)  # in place, and nothing reads what it returns
    total.narrow(0, 1, 2).add_(y.narrow(0, 1, 2), alpha=2)
    low, high = torch.aminmax(total, dim=0)
    both = torch.cat([low, high, y.t().contiguous()[0, :1]]) if flag else low
    torch.sin(x)  # dead
    return both.view(1, -1), total.sum(0), y.new_empty(sizes)


def test_any_op_of_pytorch():
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    want = many_ops(x, y, True, [0])
    got, plan = repeated(many_ops, x, y, True, [0])
    assert equal(got, want)
    assert "copy_" in plan.source and "sin" not in plan.source


def test_one_output():
    got, plan = repeated(lambda x: x + 1, torch.ones(2))
    assert torch.equal(got, torch.full((2,), 2.0)) and plan is not None


def test_a_tensor_from_elsewhere():
    elsewhere = torch.ones(2)
    got, plan = repeated(lambda x: x + elsewhere, torch.ones(2))
    assert torch.equal(got, torch.full((2,), 2.0)) and plan is None
    _, plan = repeated(lambda x: x + torch.tensor([1.0, 2.0]), torch.ones(2))
    assert plan is None


def test_a_function_that_calls_a_registered_op(repeats):
    """Its plan launches the op's kernel in place of the op, and once."""
    x, w, calls = torch.randn(4, 8), torch.randn(8, 8), []

    def function(x, w):
        calls.append(x)
        return torch.ops.vitkernels.linear_fwd(x, w, None, None, None, "gelu")[0] + 1.0

    with emulating("sm_90"):
        plans = Plans(function)
        want, *others = [plans("here", x, w) for _ in range(4)]
    (plan,) = plans._plans.values()
    assert all(torch.equal(y, want) for y in others) and len(calls) == len(repeats) == 2
    assert plan.source.count("_product_kernel") == 1 and "linear_fwd" not in plan.source


def test_a_block_hides_its_ops_from_nobody(device, repeats):
    made = call("block", device=device)
    want = anew(lambda: gradients(made))
    for _ in range(3):
        gradients(made)
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(str(func).removesuffix(".default"))
            return func(*args, **(kwargs or {}))

    ops = {f"vitkernels.{part}_{way}" for part in ("layer_norm", "linear", "mlp") for way in ("fwd", "bwd")}
    with Watch():
        assert equal(gradients(made), want)
    assert ops <= seen
    with torch.profiler.profile() as profile:
        assert equal(gradients(made), want)
    assert ops <= {event.name.replace("::", ".") for event in profile.events()}
    repeats.clear()
    assert equal(gradients(made), want) and len(repeats) == 2, "one plan forward, one backward"


@each_op()
def test_every_launcher_gets_a_plan(op, device):
    made = call(op)
    for _ in range(2):
        gradients(made)
    plans = [plan for plans in _plan._all for plan in plans._plans.values()]
    assert plans and None not in plans


def test_what_fails_is_not_remembered():
    def fails(x):
        raise ValueError(f"of {x.shape}")

    plans = Plans(fails)
    for _ in range(4):
        with pytest.raises(ValueError, match="of torch"):
            plans("here", torch.ones(2))
    assert not plans._plans


def test_a_temporary_is_freed_as_soon_as_it_is_read():
    """Not at the plan's end: of nine, two live at a time."""
    alive, most = [], []

    def chain(x):
        for _ in range(9):
            x = x * 2.0
        return x

    def mul(*args):
        alive.append(weakref.ref(result := torch.mul(*args)))
        most.append(sum(ref() is not None for ref in alive))
        return result

    _, plan = repeated(chain, torch.ones(3))
    for name in plan.run.__globals__:
        if name.startswith("mul"):
            plan.run.__globals__[name] = mul
    assert torch.equal(plan.run("here", torch.ones(3)), torch.full((3,), 512.0))
    assert (len(alive), max(most)) == (9, 2)


def test_what_is_hooked_goes_through_triton(repeats):
    """As under Triton's profiler, which is told of each launch."""
    made, told = call("linear", grad=False), []
    for _ in range(3):
        made()
    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(told.append)
    try:
        repeats.clear()
        made()
    finally:
        hooks.remove(told.append)
    assert told and not repeats


def test_no_more_is_kept_than_needed(monkeypatch):
    monkeypatch.setattr(_plan, "MAX_PLANS", 3)
    plans = Plans(lambda x: x + 1)
    for rows in range(1, 20):
        for _ in range(3):
            plans("here", torch.ones(rows))
        assert 1 <= len(plans._plans) <= len(plans._seen) <= 3


@each_op(["attention", "block", "patch_embed"])
def test_tensors_are_not_kept_alive(op, device):
    made = call(op, grad=False, device=device)
    tensors = dict(made.tensors)
    for _ in range(3):
        outputs = made.outputs()
    gone = [weakref.ref(t) for t in (*tensors.values(), *outputs)]
    del made, tensors, outputs
    gc.collect()
    assert not any(ref() is not None for ref in gone)


def test_threads(device):
    """Of which each may watch, and all repeat."""
    made = call("block", grad=False, device=device)
    want, wrong = anew(made), []
    _plan.forget()

    def work():
        wrong.extend(1 for _ in range(5) if not equal(results(made), want))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_constants_that_change_in_place(device):
    made = call("patch_embed", grad=False, device=device)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    for normalize in ((mean, std), ([0.1] * 3, [0.5] * 3)):
        seen = []
        for _ in range(4):
            seen.append(made(normalize=normalize))
            assert torch.equal(seen[-1], made(normalize=tuple(tuple(map(float, values)) for values in normalize)))
            if isinstance(normalize[0], list):
                normalize[0][0] += 1.0
            else:
                normalize[0][0].add_(1.0)
        assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize(
    ("op", "option"),
    [
        ("attention", "is_causal"),
        ("attention_qkvpacked", "is_causal"),
        ("swiglu", "gate_last"),
        ("patch_embed", "pos_embed_prefix"),
    ],
)
@pytest.mark.parametrize("value", ["no", "", (), (0,), 1, torch.tensor(True)], ids=str)
def test_what_is_no_bool_stays_what_it_was(op, option, value, device, record_launches):
    if op == "swiglu":
        x, w12, w3 = (torch.randn(shape, device=device) for shape in ((3, 16), (24, 16), (16, 12)))
        run = functools.partial(vitkernels.ops.swiglu_mlp, x, w12, None, w3, None, **{option: value})
    else:
        run = functools.partial(call(op, grad=False, device=device), **{option: value})

    def outcome():
        try:
            return [y.shape for y in results(run)]
        except (TypeError, ValueError, RuntimeError) as error:
            return str(error)

    first = outcome()
    assert [outcome() for _ in range(3)] == [first] * 3


def test_pairs_are_pairs(device, record_launches):
    made = call("block", grad=False, device=device)
    t = made.tensors
    pairs = {
        "norm1": (t["norm1_weight"], t["norm1_bias"]), "qkv": (t["qkv_weight"], t["qkv_bias"]),
        "proj": (t["proj_weight"], t["proj_bias"]), "norm2": (t["norm2_weight"], t["norm2_bias"]),
        "fc1": (t["fc1_weight"], t["fc1_bias"]), "fc2": (t["fc2_weight"], t["fc2_bias"]),
        "layer_scale": (t["gamma1"], t["gamma2"]),
    }  # fmt: skip
    run = functools.partial(vitkernels.ops.block, t["x"], **pairs, num_heads=2)
    run()
    for name in pairs:
        for other in (None, pairs[name][:1], (*pairs[name], None), t["x"], 1.0):
            with pytest.raises(TypeError, match=f"block: {name} is a .*; expected a pair"):
                run(**{name: other})
    with pytest.raises(TypeError, match="norm1 is a tuple; expected a pair"):
        run(norm1=(*pairs["norm1"], pairs["qkv"][0]), qkv=pairs["qkv"][1:])
    x, w12, w3 = (torch.randn(shape, device=device) for shape in ((3, 16), (24, 16), (16, 12)))
    run = functools.partial(vitkernels.ops.swiglu_mlp, x, w12, None, w3, None)
    for norm in ((), [], False, 0, "", (None, None), 1e-6):
        with pytest.raises(TypeError, match=r"norm is .*; expected \(weight, bias, eps\) or None"):
            run(norm=norm)


@needs_gpu
@each_op()
def test_a_graph_captures_a_repeated_call(op, repeats):
    made = call(op, grad=False, device="cuda")
    want = anew(made)
    for _ in range(2):
        made()
    graph = torch.cuda.CUDAGraph()
    repeats.clear()
    with torch.cuda.graph(graph):
        outputs = made.outputs()
    graph.replay()
    assert repeats and equal(outputs, want)
