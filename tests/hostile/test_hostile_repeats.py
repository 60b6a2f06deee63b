"""A call like one before goes straight to its launcher: only where nobody can tell, and whatever came in between.

Each op is made to know a good call. What changes then, one thing at a time, must be answered as by an op that knows
nothing: the same bits, or the same error.
"""

import functools
import gc
import sys
import threading
import weakref

import pytest
import torch
from op_calls import ATTENTION, OPS, call, each_op, needs_gpu
from test_hostile_layouts import every_other, expanded, lazily_negated, off_by_one_element, transposed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import vitkernels
from vitkernels.ops import _known
from vitkernels.ops._known import KnownCalls
from vitkernels.ops.linear import linear_fwd


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """No op knows a call of another test's; every ``find`` is noted in the list returned."""
    _known.forget()
    found, find = [], KnownCalls.find

    def noting(self, tensors, options):
        found.append(find(self, tensors, options))
        return found[-1]

    monkeypatch.setattr(KnownCalls, "find", noting)
    return found


def known(op, found, **more):
    """Make a call without gradients that ``op`` knows."""
    made = call(op, grad=False, **more)
    for _ in range(3):
        made()
    assert found[-1] is not None
    return made


@pytest.fixture
def launches(instead_of_launches):
    """Launch nothing, and note each kernel with its grid and all that it was given."""
    noted = []

    def facts(argument):
        if not isinstance(argument, torch.Tensor):
            return type(argument), argument
        lazy = argument.is_neg(), argument._is_zerotensor()
        return type(argument), argument.dtype, argument.device, argument.shape, argument.stride(), lazy

    def note(name, grid, args, kwargs):
        given = [*map(facts, args)], {key: facts(value) for key, value in kwargs.items()}
        noted.append((name, grid if isinstance(grid, tuple) else None, given))

    instead_of_launches(note)
    return noted


def outcome(run, launches=None):
    """Return what ``run()`` gives, or the error that it raises; with ``launches`` those, and no values."""
    if launches is not None:
        launches.clear()
    try:
        result = run()
    except Exception as error:
        return type(error), str(error)
    outputs = result if isinstance(result, tuple) else (result,)
    if launches is None:
        return outputs
    return [(y.dtype, y.device, y.shape, y.stride(), y.requires_grad, y.is_inference()) for y in outputs], [*launches]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(a, b, strict=True))


def unprimed(run, monkeypatch, launches=None):
    with monkeypatch.context() as without:
        without.setattr(KnownCalls, "find", lambda self, tensors, options: None)
        without.setattr(KnownCalls, "add", lambda self, tensors, options, plan=None: None)
        return outcome(run, launches)


@each_op()
@pytest.mark.parametrize("given", ["all", "least"])
def test_the_third_call_is_known_and_gives_the_same_bits(op, given, device, forgotten, monkeypatch):
    made = call(op, grad=False, device=device)
    if given == "least":
        made = made.changed(**dict.fromkeys(made.op.optional))
    want = unprimed(made, monkeypatch)
    assert not isinstance(want[0], type), want
    for number in range(4):
        forgotten.clear()
        assert equal(outcome(made), want)
        assert [f is not None for f in forgotten] == [number >= 2]


@each_op()
def test_a_known_call_needs_no_dispatcher_and_no_check(op, device, forgotten, monkeypatch, launches):
    made = known(op, forgotten, device=device)
    for module in [m for name, m in sys.modules.items() if name.startswith("vitkernels.ops.")]:
        for name in ("needs_grad", "uses_kernels", "alike", "check_shape", "check_like", "layer_norm_fwd", "linear_fwd",
                     "mlp_fwd", "swiglu_mlp_fwd", "attention_fwd", "attention_qkvpacked_fwd"):  # fmt: skip
            if hasattr(module, name):
                monkeypatch.setattr(module, name, None)
    made()


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
    "int": torch.Tensor.int,
    "uint8": lambda t: t.to(torch.uint8),
    "complex": lambda t: torch.complex(t, t),
    "one dim more": lambda t: t[None],
    "one dim less": lambda t: t[0],
    "one more": lambda t: torch.cat([t, t[:1]]),
    "none": lambda t: t[:0],
    "longer rows": lambda t: torch.cat([t, t[..., :1]], -1),
    "no channels": lambda t: t[..., :0],
    "left out": lambda t: None,
    "an array": lambda t: t.numpy(force=True),
    "a list": lambda t: t.tolist(),
    "a number": lambda t: 1.0,
    "on meta": lambda t: t.to("meta"),
    "sparse": torch.Tensor.to_sparse,
    "csr": lambda t: t.flatten(1).to_sparse_csr() if t.ndim > 1 else t.to_sparse(),
    "opaque": lambda t: t.cpu().to_mkldnn(),  # there is none on a GPU
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "quantized by channel": lambda t: torch.quantize_per_channel(
        t, t.new_ones(t.shape[-1]), t.new_zeros(t.shape[-1]), t.ndim - 1, torch.qint8
    ),
    "functional": torch._to_functional_tensor,
    "nested": lambda t: torch.nested.nested_tensor([*t]),
    "zero": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype, device=t.device),
    "a subclass": lambda t: t.as_subclass(type("Mine", (torch.Tensor,), {})),
    "that needs grad": lambda t: t.clone().requires_grad_(),
}


@each_op()
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR", "ignore:torch.quantize")
def test_a_changed_tensor(op, change, device, forgotten, monkeypatch, launches):
    """Of each tensor in turn; and again, so that what was noted of the changed call is no trap either."""
    for name in OPS[op].shapes:
        torch.manual_seed(0)
        made = known(op, forgotten, device=device)
        changed = functools.partial(made, **{name: CHANGES[change](made.tensors[name])})
        want = unprimed(changed, monkeypatch, launches)
        for _ in range(3):
            assert outcome(changed, launches) == want, name
        assert outcome(made, launches) == unprimed(made, monkeypatch, launches), name


OPTIONS = {
    "eps": [1e-3, 1, True, 0.0, -1.0, float("nan"), "1e-6", None, torch.tensor(1e-6)],
    "scale": [0.5, 1, True, float("inf"), float("nan"), "1"],
    "is_causal": [True, 1],
    "dropout_p": [1.0, 0, False, 2.0, None],
    "num_prefix_tokens": [1, -1],
    "rope": [(1, 2)],
    "q_norm": [(None, None, 1e-6, False)],
    "num_heads": [1, 0, 3, 2.0],
    "max_seqlen": [1, 0, 4, True, 99],
    "cu_seqlens": [
        torch.tensor([0, 5, 10]), torch.tensor([0, 4, 11], dtype=torch.int32), torch.tensor([5, 0], dtype=torch.int32),
        torch.tensor([0, 3, 10], dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(3), [0, 5, 10],
    ],
    "pos_embed_prefix": [False],
    "normalize": [((0.5,) * 3, (0.5,) * 3), ([0.5] * 3, [0.5] * 3), ((0.5,), (0.5,)), ((0.0,) * 3, (0.0,) * 3), 1.0],
    "attn_mask": [torch.ones(5, 5, dtype=torch.bool), torch.zeros(1, 2, 5, 5), torch.zeros(5, 5).expand(2, 1, 5, 5),
                  torch.zeros(4, 5), torch.ones(5, 5, dtype=torch.int32)],
}  # fmt: skip
NORMED = [op for op in OPS if OPS[op].normed]
DENSE = ["attention", "attention_qkvpacked"]
TAKES = {
    "eps": NORMED, "scale": ATTENTION, "is_causal": ATTENTION, "dropout_p": ATTENTION, "q_norm": ATTENTION,
    "num_prefix_tokens": DENSE, "rope": DENSE, "attn_mask": DENSE, "num_heads": ["block"],
    "max_seqlen": ["attention_varlen"], "cu_seqlens": ["attention_varlen"], "pos_embed_prefix": ["patch_embed"],
    "normalize": ["patch_embed"],
}  # fmt: skip


@pytest.mark.parametrize(("op", "option"), [(op, option) for option in OPTIONS for op in TAKES[option]])
def test_a_changed_option(op, option, device, forgotten, monkeypatch, launches):
    for value in OPTIONS[option]:
        torch.manual_seed(0)
        made = known(op, forgotten, device=device)
        value = value.to(device) if isinstance(value, torch.Tensor) else value
        changed = functools.partial(made, **{option: value})
        want = unprimed(changed, monkeypatch, launches)
        for _ in range(3):
            assert outcome(changed, launches) == want, value


@each_op()
def test_gradients_flow_once_they_are_wanted(op, device, forgotten):
    made = call(op, device=device)
    with torch.no_grad():
        for _ in range(3):
            made()
        assert forgotten[-1] is not None
    assert all(y.requires_grad for y in made.outputs())
    made.check()
    with torch.no_grad():
        assert not any(y.requires_grad for y in made.outputs())


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name() if isinstance(func, torch._ops.OpOverload) else "")
        return func(*args, **(kwargs or {}))


@each_op()
@pytest.mark.parametrize("mode", [Seen, SeenFunctions])
def test_a_mode_sees_the_op(op, mode, device, forgotten, launches):
    made = known(op, forgotten, device=device)
    for _ in range(3):
        with mode() as seen:
            made()
        assert any(name.startswith("vitkernels::") for name in seen.names)
    made()
    assert forgotten[-1] is not None


@each_op()
def test_one_mode_does_not_know_for_another(op, device, forgotten, launches):
    """Under a mode dispatch keys are alike, whichever mode it is."""
    made = call(op, grad=False, device=device)
    for _ in range(4):
        with Seen() as seen:
            made()
        assert any(name.startswith("vitkernels::") for name in seen.names)


@each_op()
@pytest.mark.parametrize("elsewhere", [False, True], ids=["in this thread", "in another"])
def test_a_profiler_sees_the_op(op, elsewhere, device, forgotten, launches):
    made = known(op, forgotten, device=device)
    config = torch._C._profiler._ExperimentalConfig(profile_all_threads=elsewhere)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, experimental_config=config) as profile:
        if elsewhere:
            with torch.no_grad():
                thread = threading.Thread(target=made)
            thread.start()
            thread.join()
        else:
            made()
    assert any(event.key.startswith("vitkernels::") for event in profile.key_averages())


@each_op()
def test_transforms_still_raise(op, device, forgotten, launches):
    made = known(op, forgotten, device=device)
    name, x = next(iter(made.tensors.items()))
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.jvp(lambda t: made(**{name: t}), (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            made(**{name: dual})
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.vmap(lambda t: made(**{name: t}))(x[None])
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda t: made.changed(**{name: t}).outputs()[0].sum())(x)


@each_op()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(op, dtype, device, forgotten, monkeypatch, launches):
    made = known(op, forgotten, device=device)
    kind = torch.device(device).type
    for there in (dtype, torch.bfloat16, dtype):
        with torch.autocast(kind, there):
            want = unprimed(made, monkeypatch, launches)
            for _ in range(3):
                assert outcome(made, launches) == want
    assert outcome(made, launches) == unprimed(made, monkeypatch, launches)


@each_op()
def test_inference_mode(op, device, forgotten, launches):
    made = known(op, forgotten, device=device)
    for _ in range(3):
        with torch.inference_mode():
            assert all(y.is_inference() for y in made.outputs())
    assert not any(y.is_inference() for y in made.outputs())


@each_op()
def test_fake_tensors(op, device, forgotten, launches):
    made = known(op, forgotten, device=device)
    with FakeTensorMode() as mode:
        fakes = {n: mode.from_tensor(t) for n, t in made.tensors.items()}
        options = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in made.options.items()}
        for _ in range(3):
            outputs = outcome(lambda: made.op.function(**fakes, **options))
            assert all(type(y) is torch._subclasses.FakeTensor for y in outputs)


@each_op()
def test_another_backend(op, device, forgotten, monkeypatch, launches):
    made = known(op, forgotten, device=device)
    forgotten.clear()
    with vitkernels.use_backend("torch"):
        made()
    monkeypatch.setenv("VITKERNELS_BACKEND", "torch")
    made()
    assert forgotten == [None, None]
    monkeypatch.setenv("VITKERNELS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="VITKERNELS_BACKEND"):
        made()


def test_one_tensor_twice(device, forgotten):
    """PyTorch's comparison takes no tensor twice: always checked, and right."""
    q = torch.randn(1, 2, 5, 8, device=device)
    first = vitkernels.ops.attention(q, q, q)
    for _ in range(4):
        assert torch.equal(vitkernels.ops.attention(q, q, q), first)
    assert not any(forgotten)
    assert not any(kind.calls for calls in _known._all for kind in calls._kinds.values()), "compared in vain"


def test_no_more_is_kept_than_needed(device, monkeypatch):
    monkeypatch.setattr(_known, "MAX_KINDS", 3)
    calls = KnownCalls(linear_fwd)
    for rows in range(1, 9):
        for _ in range(3):
            calls.add((torch.randn(rows, 16, device=device),), ())
        assert len(calls._kinds) <= 3
    layouts = [torch.empty_strided((9, 16), (s, 1), device=device) for s in range(16, 36)]
    for x in layouts:
        calls.add((x,), ())
    # Of the first nothing but its shape is kept.
    assert [calls.find((x,), ()) is not None for x in layouts] == [0 < i <= _known.MAX_CALLS for i in range(20)]


def test_tensors_are_not_kept_alive(device):
    class Mine(torch.Tensor):
        pass

    calls, x, mine = KnownCalls(linear_fwd), torch.randn(3, 16, device=device), torch.randn(3).as_subclass(Mine)
    for _ in range(3):
        calls.add((x,), ())
        calls.add((mine,), ())
        calls.add((x,), (x, (x,)))
    assert calls.find((x,), ()) and len(calls._kinds) == 1
    gone = [weakref.ref(t) for t in (x, mine, Mine)]
    del x, mine, Mine
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:DeprecationWarning")
def test_a_trace_leaves_nothing(device, forgotten, launches):
    made = call("linear", grad=False, device=device)
    for _ in range(3):
        torch.jit.trace(lambda x: made(x=x), made.tensors["x"], check_trace=False)
    assert not any(calls._kinds for calls in _known._all)


def test_other_head_dims_have_another_scale(device, forgotten, monkeypatch):
    """Two blocks whose input is alike, and their options."""
    narrow, wide = (call("block", grad=False, device=device, D=D) for D in (8, 16))
    for made in (narrow, narrow, narrow, wide, wide, narrow, wide):
        assert equal(outcome(made), unprimed(made, monkeypatch))
    assert all(forgotten[-2:])


def test_constants_that_change_in_place(device, forgotten, monkeypatch):
    made = known("patch_embed", forgotten, device=device)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    for normalize in ((mean, std), (tuple(mean), (0.5,) * 3), ([0.1] * 3, [0.5] * 3)):
        run = functools.partial(made, normalize=normalize)
        for _ in range(4):
            assert equal(outcome(run), unprimed(run, monkeypatch))
            if isinstance(normalize[0], list):
                normalize[0][0] += 1.0
            else:
                normalize[0][0].add_(1.0)


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
def test_what_is_no_bool_stays_what_it_was(op, option, value, device, forgotten, monkeypatch, launches):
    if op == "swiglu":
        x, w12, w3 = (torch.randn(shape, device=device) for shape in ((3, 16), (24, 16), (16, 12)))
        run = functools.partial(vitkernels.ops.swiglu_mlp, x, w12, None, w3, None, **{option: value})
    else:
        run = functools.partial(known(op, forgotten, device=device), **{option: value})
    want = unprimed(run, monkeypatch, launches)
    for _ in range(4):
        assert outcome(run, launches) == want


def test_pairs_are_pairs(device, forgotten, launches):
    made = known("block", forgotten, device=device)
    t = made.tensors
    pairs = {
        "norm1": (t["norm1_weight"], t["norm1_bias"]), "qkv": (t["qkv_weight"], t["qkv_bias"]),
        "proj": (t["proj_weight"], t["proj_bias"]), "norm2": (t["norm2_weight"], t["norm2_bias"]),
        "fc1": (t["fc1_weight"], t["fc1_bias"]), "fc2": (t["fc2_weight"], t["fc2_bias"]),
        "layer_scale": (t["layer_scale1"], t["layer_scale2"]),
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
    for _ in range(3):
        run()
    for norm in ((), [], False, 0, "", (None, None), 1e-6):
        with pytest.raises(TypeError, match=r"norm is .*; expected \(weight, bias, eps\) or None"):
            run(norm=norm)


def test_a_subclass_is_not_asked_for_more(device, forgotten, launches):
    asked = []

    class Mine(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            asked.append(getattr(func, "__name__", ""))
            return super().__torch_function__(func, types, args, kwargs or {})

    made = known("linear", forgotten, device=device)
    mine = made.tensors["x"].as_subclass(Mine)
    counts = []
    for _ in range(4):
        asked.clear()
        made(x=mine)
        counts.append([*asked])
    assert counts[0] == counts[-1] and "stride" not in counts[-1]


@pytest.mark.parametrize("policy", ["sizes", "strides"])
@each_op()
def test_a_tensor_that_python_sizes_is_an_error(op, policy, device, forgotten, monkeypatch, launches):
    """Not the process's end."""
    for name in OPS[op].shapes:
        made = known(op, forgotten, device=device)
        odd = torch.Tensor._make_subclass(torch.Tensor, made.tensors[name], dispatch_sizes_strides_policy=policy)
        for _ in range(3):
            with pytest.raises(RuntimeError):
                made(**{name: odd})


def test_what_ran_on_meta_first(device, forgotten, launches):
    made, meta = call("linear", grad=False, device=device), call("linear", grad=False, device="meta")
    for _ in range(3):
        meta()
    for _ in range(3):
        made()
    assert forgotten[-1] is not None


def test_without_pytorchs_comparison_every_call_is_checked(device, forgotten, monkeypatch, launches):
    monkeypatch.setattr(_known, "TensorGuards", None)
    made = call("linear", grad=False, device=device)
    for _ in range(4):
        made()
    assert forgotten == [None] * 4


@needs_gpu
@each_op()
def test_a_graph_captures_a_known_call(op, forgotten):
    made = known(op, forgotten, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = made.outputs()
    graph.replay()
    assert equal(outputs, outcome(made))
