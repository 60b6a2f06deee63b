"""compile_inference: CUDA graphs of a model. Without a GPU, a recording of ops on fixed memory stands in for them."""

import contextlib
import copy
import gc
import itertools
import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vitkernels
from vitkernels import _inference, compile_inference, use_backend
from vitkernels.models import VisionTransformer

SIZES = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
MEAN_STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


class Recorded(TorchDispatchMode):
    """As a CUDA graph: repeats the ops of a forward on the memory that they used, and no Python of it."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, results))
        return results

    def replay(self):
        for func, args, kwargs, results in self.steps:
            again = func(*args, **kwargs)
            olds, news = (r if isinstance(r, (tuple, list)) else (r,) for r in (results, again))
            for old, new in zip(olds, news, strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Graphs:
    """Stands in for CudaGraphs, and counts."""

    def __init__(self, device):
        self.device, self.warm_ups, self.replays, self.waits, self.running = device, 0, 0, 0, 0

    def enter(self):
        self.running += 1
        assert self.running == 1, "two threads at once"

    def warm_up(self, forward):
        self.warm_ups += 1
        forward()

    def capture(self, forward):
        with Recorded() as recorded:
            results = forward()

        def replay():
            self.replays += 1
            with torch.no_grad():
                recorded.replay()
            self.running = 0

        return replay, results

    def finish(self):
        self.waits += 1


@pytest.fixture
def mechanism(monkeypatch):
    """The stand-ins that were made, the last one in use."""
    made = []

    def make(device):
        made.append(Graphs(device))
        return made[-1]

    monkeypatch.setattr(_inference, "_mechanism", make)
    return made


def vit(**options):
    return VisionTransformer(**SIZES | options).eval()


def timm_vit():
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(**SIZES).eval()
    vitkernels.accelerate(model, strict=True)
    return model


@pytest.fixture(params=[vit, timm_vit])
def model(request):
    return request.param()


def images(batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, 32, 32).to(dtype)


@torch.no_grad()
def expected(model, x):
    return model(x)


def test_a_shape_is_captured_once_and_replayed(model, mechanism):
    graphed = compile_inference(model)
    forwards = []
    hook = model.blocks[0].register_forward_hook(lambda *_: forwards.append(1))
    for i in range(4):
        x = images()
        want = expected(model, x)
        forwards.clear()
        got = graphed(x)
        assert torch.equal(got, want) and not got.requires_grad
        assert bool(forwards) == (i == 0)  # no Python of the model runs in a replay
    (graphs,) = mechanism
    assert graphs.warm_ups == graphed.captures == 1 and graphs.replays == 4
    hook.remove()


def test_each_shape_dtype_and_choice_has_a_graph(model, mechanism):
    graphed = compile_inference(model)
    with use_backend("torch"):
        for x in (images(1), images(2), images(2), images(1)):
            assert torch.equal(graphed(x), expected(model, x))
        assert graphed.captures == 2
        with torch.autocast("cpu", torch.bfloat16):
            x = images(2)
            out = graphed(x)
            assert out.dtype == torch.bfloat16 and torch.equal(out, expected(model, x))
            with torch.no_grad():  # weights are cast in each replay: autocast frees what it has cast
                model.head.weight.neg_()
            assert torch.equal(graphed(x), compile_inference(model)(x))
            assert not torch.equal(graphed(x), out)
        assert graphed.captures == 3
        assert graphed(images(2)).dtype == torch.float32 and graphed.captures == 3
        graphed.model.half()
        assert graphed(images(2, torch.float16)).dtype == torch.float16
    x = images(2, torch.float16)
    assert torch.equal(graphed(x), expected(model, x))  # another backend
    assert graphed.captures == 5


def test_weights_written_in_place_count_at_once(model, mechanism):
    graphed = compile_inference(model)
    x = images()
    before = graphed(x)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    assert not torch.equal(graphed(x), before) and torch.equal(graphed(x), expected(model, x))
    model.load_state_dict(vit().state_dict())
    assert torch.equal(graphed(x), expected(model, x)) and graphed.captures == 1


def halve(model):
    model.half().float()


def replace_head(model):
    model.head = nn.Linear(32, 5).eval()


def replace_weight(model):
    model.head.weight = nn.Parameter(torch.randn(5, 32))


def replace_data(model):
    model.head.weight.data = torch.randn(5, 32)


def wrap_head(model):
    model.head = nn.Sequential(model.head, nn.ReLU()).eval()


def hook_head(model):
    model.head.register_forward_hook(lambda module, args, out: out * 2)


def delete_block(model):
    del model.blocks[1]


@pytest.mark.parametrize(
    "change", [halve, replace_head, replace_weight, replace_data, wrap_head, hook_head, delete_block]
)
def test_what_was_replaced_is_captured_anew(change, model, mechanism):
    graphed = compile_inference(model)
    x = images()
    before = graphed(x)
    graphed(images(1))
    change(model)
    got = graphed(x)
    assert torch.equal(got, expected(model, x)) and (change is halve or not torch.equal(got, before))
    assert graphed.captures == 3 and len(graphed.captured) == 1
    graphed(x)
    assert graphed.captures == 3


def test_weights_in_fp8_written_in_place_are_captured_anew(mechanism, computed_by_pytorch):
    model = timm_vit()
    vitkernels.accelerate(model, precision="fp8")
    graphed, x = compile_inference(model), images()
    with use_backend("emulated"):
        before = graphed(x)
        assert torch.equal(graphed(x), before) and graphed.captures == 1
        with torch.no_grad():
            model.blocks[0].mlp.fc1.weight.mul_(-1)
        assert torch.equal(graphed(x), expected(model, x)) and graphed.captures == 2
        assert not torch.equal(graphed(x), before)


SWITCHES = {
    "set": lambda model: model.set_adapter("other"),
    "disable": lambda model: model.base_model.disable_adapter_layers(),
    "merge": lambda model: model.merge_adapter(),
    "scale": lambda model: model.base_model.model.blocks[0].attn.qkv.scale_layer(3.0),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_switched_adapters_are_captured_anew(switch, mechanism):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["qkv"], modules_to_save=["head"], init_lora_weights=False)
    model = peft.get_peft_model(timm_vit(), config)
    model.add_adapter("other", config)
    model.eval()
    model.base_model.model.head.modules_to_save["other"].weight.data.normal_()
    graphed, x = compile_inference(model), images()
    before = graphed(x)
    graphed(x)
    assert graphed.captures == 1
    SWITCHES[switch](model)
    wanted = expected(model, x)
    assert torch.equal(graphed(x), wanted) and graphed.captures == 2
    assert torch.equal(graphed(x), wanted) and graphed.captures == 2
    assert (switch == "merge") == torch.allclose(wanted, before, atol=1e-4)


def test_a_restored_model_is_captured_anew(mechanism):
    model, x = timm_vit(), images()
    graphed = compile_inference(model)
    graphed(x)
    vitkernels.restore(model)
    assert torch.equal(graphed(x), expected(model, x)) and graphed.captures == 2


def test_without_the_look_reset_captures_anew(model, mechanism):
    graphed = compile_inference(model, check_model=False)
    x = images()
    before = graphed(x)
    replace_weight(model)
    assert torch.equal(graphed(x), before)
    graphed(images(1))  # a new shape is no error
    graphed.reset()
    assert graphed.captured == () and torch.equal(graphed(x), expected(model, x))


def test_the_graph_of_longest_ago_is_dropped(mechanism):
    graphed = compile_inference(vit(), max_graphs=2)
    shapes = lambda: [shape[0] for shape, _ in graphed.captured]  # noqa: E731
    graphed(images(1)), graphed(images(2)), graphed(images(1))
    assert shapes() == [2, 1] and mechanism[0].waits == 0
    graphed(images(3))
    assert shapes() == [1, 3] and mechanism[0].waits == 1  # it may still run
    graphed(images(1)), graphed(images(2))
    assert shapes() == [1, 2] and graphed.captures == 4


def test_batches_are_padded(model, mechanism):
    graphed = compile_inference(model, batch_sizes=(8, 1, 4))
    for count, size in ((1, 1), (2, 4), (4, 4), (3, 4), (5, 8), (7, 8)):
        x = images(count)
        got = graphed(x)
        assert got.shape == (count, 5)
        padded = torch.cat([x, torch.zeros(size - count, 3, 32, 32)])
        assert torch.equal(got, expected(model, padded)[:count])
    assert graphed.captures == 3
    with pytest.raises(ValueError, match="9 images; expected 8 at most, the largest of batch_sizes"):
        graphed(images(9))


def test_images_before_leave_nothing_in_the_padding(mechanism):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return (x * self.scale).sum((0, 1, 2)) + x * 0  # of all images, to see the padding

    graphed = compile_inference(Sum().eval(), batch_sizes=[4])
    graphed(torch.full((4, 1, 1, 2), 7.0))
    assert torch.equal(graphed(torch.ones(1, 1, 1, 2)), torch.ones(1, 1, 1, 2))


def test_outputs_are_copies_or_the_graphs_own(mechanism):
    model = vit()
    a, b = images(), images()
    graphed = compile_inference(model)
    first = graphed(a)
    graphed(b)
    assert torch.equal(first, expected(model, a))
    graphed = compile_inference(model, clone_outputs=False)
    first = graphed(a).clone()
    own = graphed(a)
    assert torch.equal(first, own)
    assert graphed(b).data_ptr() == own.data_ptr() and torch.equal(own, expected(model, b))


def test_inputs_are_copied(mechanism):
    model = vit()
    graphed = compile_inference(model)
    x = images()
    want = expected(model, x)
    for given in (x, x.to(memory_format=torch.channels_last), x.expand(2, -1, -1, -1), torch.cat([x, x], 1)[:, 3:]):
        assert torch.equal(graphed(given), want)
    before = x.clone()
    graphed(x)
    assert torch.equal(x, before) and graphed.captures == 1


def test_uint8_images(mechanism):
    x = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    model = vit(normalize=MEAN_STD)  # which takes them itself
    assert torch.equal(compile_inference(model)(x), expected(model, x))
    plain = vit()
    plain.load_state_dict(model.state_dict())
    graphed = compile_inference(plain, normalize=MEAN_STD)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in MEAN_STD)
    torch.testing.assert_close(graphed(x), expected(plain, (x / 255 - mean) / std), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(graphed(x / 255), graphed(x), rtol=1e-4, atol=1e-5)
    assert [dtype for _, dtype in graphed.captured] == [torch.float32, torch.uint8]
    plain.bfloat16()
    assert graphed(x).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"normalize is for 3 channels; got images of \(2, 1, 32, 32\)"):
        graphed(x[:, :1])


def test_structures_of_outputs(mechanism):
    import collections

    Pair = collections.namedtuple("Pair", "a b")

    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            y = self.head(x)
            return {"logits": y, "more": [y + 1, (x * 2, None)], "pair": Pair(y, 3)}

    model = Several().eval()
    graphed, x = compile_inference(model, batch_sizes=(4,)), torch.randn(3, 4)
    got = graphed(x)
    assert list(got) == ["logits", "more", "pair"] and isinstance(got["pair"], Pair) and got["pair"].b == 3
    assert got["logits"].shape == (3, 3) and torch.equal(got["pair"].a, got["logits"])
    assert torch.equal(got["logits"] + 1, got["more"][0])
    torch.testing.assert_close(got["logits"], model.head(x).detach())
    assert torch.equal(got["more"][1][0], x * 2) and got["more"][1][1] is None


def test_a_model_of_transformers(mechanism):
    transformers = pytest.importorskip("transformers", minversion="4.50")
    config = transformers.ViTConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=64, image_size=32, patch_size=16
    )
    model = transformers.ViTForImageClassification(config).eval()
    vitkernels.accelerate(model)
    graphed = compile_inference(model)
    for _ in range(2):
        x = images()
        got = graphed(x)
        assert type(got) is type(expected(model, x)) and torch.equal(got.logits, expected(model, x).logits)


def test_threads_get_their_own_results(mechanism):
    model = vit()
    graphed = compile_inference(model, max_graphs=2)
    errors = []

    def work(seed):
        try:
            generator = torch.Generator().manual_seed(seed)
            for i in range(12):
                x = torch.randn(1 + (seed + i) % 3, 3, 32, 32, generator=generator)
                with use_backend("torch"):
                    assert torch.equal(graphed(x), expected(model, x))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors


def test_inference_mode_within_and_without(mechanism):
    model = vit()
    graphed, x = compile_inference(model), images()
    with torch.inference_mode():
        first = graphed(x)
        given = x.clone()
    assert not first.is_inference()
    assert torch.equal(graphed(given), first)
    with torch.no_grad():
        assert torch.equal(graphed(x), first)


def test_ahead_of_the_first_call(mechanism):
    graphed = compile_inference(vit(), batch_sizes=(1, 4))
    graphed.capture((3, 3, 32, 32), torch.float32)
    assert graphed.captured == (((4, 3, 32, 32), torch.float32),) and graphed.captures == 1
    graphed(images(4))
    assert graphed.captures == 1


def test_states_of_the_model_stay(mechanism):
    model = vit()
    state = copy.deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    compile_inference(model)(images(1).zero_())
    assert not model.training and all(torch.equal(a, state[k]) for k, a in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    images(1)
    assert not torch.equal(torch.get_rng_state(), generator)


class Bad(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.head, self.what = nn.Linear(4, 3), what

    def forward(self, x):
        return self.what(self, x)


def grow(self, x):
    self.head.weight = nn.Parameter(self.head.weight.detach().clone())
    return self.head(x)


CANNOT = {
    "item": (lambda self, x: self.head(x) * x.sum().item(), "cannot be captured in a CUDA graph: it calls aten._local"),
    "a branch": (lambda self, x: self.head(x) if x.sum() >= 0 else x, "it calls aten._local_scalar_dense"),
    "a number": (lambda self, x: self.head(x) * int(x.sum()), "it calls aten._local_scalar_dense"),
    "nonzero": (lambda self, x: self.head(x[x[:, 0].nonzero()[:, 0]]), "it calls aten.nonzero"),
    "a bool index": (lambda self, x: self.head(x)[x[:, 0] >= 0], "it calls aten.index"),
    "repeats": (lambda self, x: x.repeat_interleave(torch.ones(4, dtype=torch.int64), 1), "aten.repeat_interleave"),
    "unique": (lambda self, x: x.unique(), "it calls aten._unique2"),
    "what grows": (grow, "it replaces parameters, buffers or submodules"),
    "no tensor": (lambda self, x: 3, "Bad returns no tensor"),
    "a set": (lambda self, x: {self.head(x)}, "the model returns a set; expected tensors, or tuples"),
}


@pytest.mark.parametrize("what", CANNOT)
def test_what_cannot_be_captured(what, mechanism):
    function, message = CANNOT[what]
    graphed = compile_inference(Bad(function).eval())
    with pytest.raises(RuntimeError, match=message):
        graphed(torch.ones(2, 4))
    assert graphed.captured == () and graphed.captures == 0


def test_an_error_of_the_capture_is_explained(mechanism, monkeypatch):
    def capture(self, forward):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nSearch for `cudaError…`")

    monkeypatch.setattr(Graphs, "capture", capture)
    with pytest.raises(RuntimeError, match=r"captured in a CUDA graph: CUDA error: operation not permitted when stream "
                       r"is capturing. A graph repeats kernels") as raised:  # fmt: skip
        compile_inference(vit())(images())
    assert "cudaError" in str(raised.value.__cause__) and "cudaError" not in str(raised.value)


def test_other_errors(mechanism):
    model = vit()
    graphed = compile_inference(model)
    with pytest.raises(TypeError, match=r"images are a list; expected a torch\.Tensor"):
        graphed([images()])
    with pytest.raises(ValueError, match=r"images have shape \(0, 3, 32, 32\); expected one image at least"):
        graphed(images(0))
    with pytest.raises(RuntimeError, match="images require a gradient"):
        graphed(images().requires_grad_())
    with torch.no_grad():
        graphed(images().requires_grad_())
    with pytest.raises(ValueError, match="images are on meta; expected cpu, as the model, or the CPU"):
        graphed(images().to("meta"))
    with pytest.raises(TypeError, match="floating-point"):
        graphed(images().to(torch.uint8))  # the model's own
    model.train()
    with pytest.raises(RuntimeError, match=r"VisionTransformer is in training mode; expected model.eval\(\)"):
        graphed(images())
    model.eval().head.train()
    with pytest.raises(RuntimeError, match="'head' of VisionTransformer is in training mode"):
        graphed(images())
    with pytest.raises(ValueError, match=r"images have shape \(\); expected one image at least"):
        graphed(torch.ones(()))
    with pytest.raises(RuntimeError, match="Identity is on no device, as it has no parameters; expected one device"):
        compile_inference(nn.Identity().eval())(images())


def test_within_what_no_graph_passes_through(mechanism):
    graphed, x = compile_inference(vit()), images()
    for transformed, given in ((torch.func.vmap(graphed), x[None]), (torch.func.grad(lambda x: graphed(x).sum()), x)):
        with pytest.raises(RuntimeError, match=r"called within a transform of torch\.func"):
            transformed(given)
    torch._dynamo.reset()
    whole = torch.compile(lambda x: graphed(x) + 1, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"called in what torch\.compile or torch\.export traces"):
        whole(x)

    class Within(nn.Module):
        def forward(self, x):
            return graphed(x) + 1

    with pytest.raises(RuntimeError, match=r"called in what torch\.compile or torch\.export traces"):
        torch.export.export(Within(), (x,))
    assert graphed.captures == 0
    broken = torch.compile(lambda x: graphed(x) + 1, backend="eager")  # it makes the call between two graphs
    for _ in range(2):
        assert torch.equal(broken(x), expected(graphed.model, x) + 1)
    assert graphed.captures == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_sizes": ()}, ValueError, "batch_sizes is .*; expected positive sizes"),
        ({"batch_sizes": (0, 4)}, ValueError, "expected positive sizes"),
        ({"batch_sizes": (1.5,)}, TypeError, "batch_sizes is a float; expected an integer"),
        ({"max_graphs": 0}, ValueError, "max_graphs is 0; expected 1 at least"),
        ({"max_graphs": "8"}, TypeError, "max_graphs is a str; expected an integer"),
        ({"normalize": ((0.5,), (0.5, 0.5))}, ValueError, "normalize is not"),
        ({"normalize": ((0.5,), (0.0,))}, ValueError, "expected finite numbers, std positive"),
        ({"model": "a model"}, TypeError, "expected a torch.nn.Module"),
        (
            {"model": vit(normalize=MEAN_STD), "normalize": MEAN_STD},
            ValueError,
            "normalize is given, and 'patch_embed' of VisionTransformer normalizes its images itself",
        ),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        compile_inference(**{"model": vit()} | options)


def test_on_a_cpu():
    """There is nothing to capture; under the backends for tests it calls the model."""
    model = vit()
    x = images()
    for backend in ("auto", "triton"):
        with use_backend(backend), pytest.raises(RuntimeError, match="is on cpu, which has no CUDA graphs"):
            compile_inference(model)(x)
    for backend in ("torch", "emulated"):
        graphed = compile_inference(model, batch_sizes=(4,))
        with use_backend(backend):
            for x in (images(), images(4)):
                padded = torch.cat([x, torch.zeros(4 - len(x), 3, 32, 32)])
                assert torch.equal(graphed(x), expected(model, padded)[: len(x)])


def test_an_accelerated_model_never_waits_for_the_gpu(device):
    """Neither between its ops, by the dispatcher, nor in launchers: each gets a plan, which holds tensors alone."""
    from vitkernels.ops import _plan

    pytest.importorskip("triton")
    for build in (vit, timm_vit):
        _plan.forget()
        model, x = build().to(device), images().to(device)
        with torch.no_grad():
            with _inference._Waits() as waits:
                model(x)
            assert waits.found is None
            for _ in range(3):
                model(x)
            with _inference._Waits():  # op by op: a block's own plan hides the plans of its ops
                for _ in range(3):
                    model(x)
        plans = [plan for plans in _plan._all for plan in plans._plans.values()]
        assert len(plans) >= 5 and None not in plans
        for plan in plans:
            assert not any(word in plan.source for word in ("item", "tolist", "nonzero", "_local_scalar", "cpu()"))


@pytest.fixture
def cuda(monkeypatch):
    """Stands in for what CudaGraphs calls of torch.cuda; ``cuda.log`` tells the calls in order."""

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    class Cuda:
        current = Stream("current")

        @contextlib.contextmanager
        def stream(self, stream):
            before, self.current = self.current, stream
            yield
            self.current = before

        @contextlib.contextmanager
        def graph(self, graph, *, pool, stream, capture_error_mode):
            log.append(f"capture on {stream.name} into {pool}, {capture_error_mode}")
            with self.stream(stream):
                yield

    class CUDAGraph:
        def replay(self):
            log.append("replay")

    fake, log, pools = Cuda(), [], itertools.count(1)
    fake.log, fake.Stream_ = log, Stream
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: f"pool {next(pools)}")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: fake.current)
    monkeypatch.setattr(torch.cuda, "stream", fake.stream)
    monkeypatch.setattr(torch.cuda, "graph", fake.graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
    return fake


def test_the_order_of_what_cuda_is_asked(cuda):
    graphs = _inference.CudaGraphs(torch.device("cuda", 0))

    def forward():
        cuda.log.append(f"forward on {cuda.current.name}")
        return 1

    graphs.warm_up(forward)
    replay, results = graphs.capture(forward)
    assert results == 1
    graphs.enter()
    replay()
    with cuda.stream(cuda.Stream_("another")):  # the pool's memory is shared: replays must not overlap
        graphs.enter()
        replay()
        graphs.enter()
    graphs.enter()
    graphs.finish()
    assert cuda.log == [
        "side waits for current", *["forward on side"] * 3, "current waits for side",
        "capture on side into pool 1, thread_local", "forward on side",
        "replay", "another waits for current", "replay", "current waits for another", "synchronize",
    ]  # fmt: skip


def test_a_pool_without_a_graph_is_not_captured_into(cuda):
    """PyTorch gives it up with its last graph; results that are still held keep its memory, and its name, taken."""
    graphs = _inference.CudaGraphs(torch.device("cuda", 0))

    def fails():
        raise RuntimeError("no capture")

    def pools():
        found = [line.split(" into ")[1].split(",")[0] for line in cuda.log if line.startswith("capture")]
        cuda.log.clear()
        return found

    with pytest.raises(RuntimeError, match="no capture"):
        graphs.capture(fails)
    first, results = graphs.capture(lambda: torch.ones(1))
    second, _ = graphs.capture(lambda: 1)
    assert pools() == ["pool 1", "pool 2", "pool 2"]
    del first
    third, _ = graphs.capture(lambda: 1)
    assert pools() == ["pool 2"]  # which the second's graph keeps
    del second, third
    gc.collect()
    graphs.capture(lambda: 1)
    assert pools() == ["pool 3"] and results.eq(1).all()


def test_one_graph_at_a_time_has_a_pool_of_its_own(cuda, monkeypatch):
    monkeypatch.setattr(_inference, "_mechanism", _inference.CudaGraphs)
    graphed = compile_inference(nn.Linear(4, 3).eval(), max_graphs=1, clone_outputs=False)
    held = [graphed(torch.ones(batch, 4)) for batch in (1, 2, 1)]
    captures = [line.split(",")[0] for line in cuda.log if line.startswith("capture")]
    assert captures == [f"capture on side into pool {i}" for i in (1, 2, 3)] and len(held) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: CUDA graphs cannot be captured")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    """On the GPU day: graphs of two shapes in one pool, streams, changed weights, and what cannot be captured."""
    model = timm_vit().to("cuda", dtype)
    graphed = compile_inference(model, batch_sizes=(1, 4))
    for i in range(8):
        x = images(1 + i % 4, dtype)
        want = expected(model, torch.cat([x, x.new_zeros((4 if i % 4 else 1) - len(x), 3, 32, 32)]).cuda())[: len(x)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream) if i % 2 else torch.cuda.stream(torch.cuda.current_stream()):
            got = graphed(x.cuda() if i % 3 else x)
        torch.cuda.synchronize()
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert graphed.captures == 2
    with torch.no_grad():
        model.head.weight.mul_(2)
    x = images(4, dtype).cuda()
    torch.testing.assert_close(graphed(x), expected(model, x), rtol=0, atol=0)
    model.head.weight = nn.Parameter(torch.randn_like(model.head.weight))
    torch.testing.assert_close(graphed(x), expected(model, x), rtol=0, atol=0)
    assert graphed.captures == 3
    bad = compile_inference(Bad(lambda self, x: self.head(x) * x.sum().item()).eval().cuda())
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        bad(torch.ones(2, 4, device="cuda"))
    torch.testing.assert_close(graphed(x), expected(model, x), rtol=0, atol=0)
