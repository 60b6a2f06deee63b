"""python -m vitkernels.tools.hub: what it builds, loaded and put into models by Hugging Face's own ``kernels``."""

import contextlib
import importlib
import json
import shutil

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
kernels = pytest.importorskip("kernels", reason="the package of the hub loads what was built")
timm = pytest.importorskip("timm")

from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping  # noqa: E402
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata  # noqa: E402  # what reads and checks a repository
from timm.models import vision_transformer  # noqa: E402

import vitkernels  # noqa: E402
from vitkernels.testing.compare import check_op  # noqa: E402
from vitkernels.tools import hub  # noqa: E402
from vitkernels.tools.hub.__main__ import main  # noqa: E402

BACKEND = "cuda" if torch.cuda.is_available() else "cpu"
DIM = 64


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "vitkernels"
    main(["--out", str(out), "--repo-id", "someone/vitkernels"])
    return out


@pytest.fixture(scope="module")
def kernel(repository):
    return kernels.get_local_kernel(repository)


def test_layout(repository):
    assert [str(backend).lower() for backend in Build.open(repository).general.backends] == [*hub.BACKENDS]
    assert 'layer_name="LayerNorm"' in (repository / "CARD.md").read_text()
    variants = sorted((repository / "build").iterdir())
    assert [folder.name for folder in variants] == ["torch-cpu", "torch-cuda"]
    ids = set()
    for folder in variants:
        metadata = Metadata.read_from_file(folder / "metadata.json")
        assert metadata.id.isidentifier()
        ids.add(metadata.id)
        given = json.loads((folder / "metadata.json").read_text())["digest"]
        assert Digest.hash_variant(DigestAlgorithm.SHA256, folder).files == given["files"]
        source = repository / "torch-ext" / "vitkernels"
        assert all((source / name).read_bytes() == (folder / name).read_bytes() for name in given["files"])
    assert len(ids) == len(variants)


def test_holds_the_tuning_tables(tmp_path, monkeypatch):
    """Also one that a search has just written."""
    for part in hub.PARTS:
        if part != "tuning":
            (tmp_path / part).symlink_to(hub.ROOT / part)
    shutil.copytree(hub.ROOT / "tuning", tmp_path / "tuning", dirs_exist_ok=True)
    (tmp_path / "tuning" / "tables").mkdir(exist_ok=True)
    (tmp_path / "tuning" / "tables" / "my-gpu.json").write_text('{"schema": 1}')
    before = hub.sources()
    monkeypatch.setattr(hub, "ROOT", tmp_path)
    files = hub.sources()
    assert files.pop("tuning/tables/my-gpu.json") == '{"schema": 1}'
    assert files == before


def test_lives_beside_the_library(kernel):
    """Every module imports under the name that kernels gave, and the ops have a namespace of their own."""
    name = kernel.__name__
    assert name != "vitkernels" and kernel.ops is not vitkernels.ops
    assert kernel.ops._registry.OPS.keys() == vitkernels.ops._registry.OPS.keys()
    for file in sorted(hub.sources()):
        module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if file.endswith(".py") and module != "__init__":
            importlib.import_module(f"{name}.{module}")
    assert hasattr(getattr(torch.ops, name), "layer_norm_fwd")


def agrees(kernelized: nn.Module, original: nn.Module, x: torch.Tensor, **masks) -> None:
    """Judge the output and the gradients of the input and every parameter."""
    tensors = {name.replace(".", "__"): p.detach().clone().requires_grad_() for name, p in original.named_parameters()}

    def call(module):
        def function(x, **tensors):
            named = {name.replace("__", "."): t for name, t in tensors.items()}
            return torch.func.functional_call(module, named, (x,), masks)

        return function

    check_op(call(kernelized), call(original), {"x": x.requires_grad_()} | tensors)


@pytest.fixture
def mapping(repository):
    """Map each layer to the one in the repository, for the device at hand."""
    names = ("LayerNorm", "RMSNorm", "Mlp", "Attention", "Block")
    layers = {name: {BACKEND: LocalLayerRepository(repository, layer_name=name)} for name in names}
    with use_kernel_mapping(layers, inherit_mapping=False):
        yield


@pytest.fixture
def kernelizable(monkeypatch):
    """Let kernels replace the forward of a class, for the length of a test: replace_kernel_forward_from_hub."""

    def make(cls, name):
        monkeypatch.setattr(cls, "kernel_layer_name", name, raising=False)
        monkeypatch.setattr(cls, "kernel_condition", staticmethod(lambda module: True), raising=False)

    make(nn.LayerNorm, "LayerNorm")
    make(timm.layers.Mlp, "Mlp")
    return make


@contextlib.contextmanager
def ops_called(kernel, also=()):
    """Collect the names of the kernel's ops that are called, and of PyTorch's ops ``also``."""
    from torch.utils._python_dispatch import TorchDispatchMode

    called = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == kernel.__name__ or func in also:
                called.append(func.name().partition("::")[2])
            return func(*args, **(kwargs or {}))

    with Watch():
        yield called


@pytest.mark.parametrize("layer", ["LayerNorm", "Mlp"])
def test_kernelized_layers_of_pytorch_and_timm(layer, kernel, mapping, kernelizable, device):
    def build():
        torch.manual_seed(0)
        made = nn.LayerNorm(DIM, eps=1e-5) if layer == "LayerNorm" else timm.layers.Mlp(DIM, 2 * DIM)
        for p in made.parameters():
            nn.init.normal_(p, std=0.1)
        return made.to(device)

    kernelized = kernelize(build(), mode=Mode.TRAINING, device=BACKEND, use_fallback=False)
    x = torch.randn(2, 10, DIM, device=device)
    with ops_called(kernel) as called:
        kernelized(x)
    assert called == [{"LayerNorm": "layer_norm_fwd", "Mlp": "mlp_fwd"}[layer]]
    agrees(kernelized, build(), x)


def small(layer: str, **more) -> nn.Module:
    """timm's layer with random parameters, also of norms and biases."""
    torch.manual_seed(0)
    made = getattr(vision_transformer, layer)(DIM, 2, qkv_bias=True, norm_layer=timm.layers.LayerNorm, **more)
    for p in made.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return made


OF_BLOCKS = {"LayerNorm": timm.layers.LayerNorm, "Mlp": timm.layers.Mlp, "Attention": timm.layers.Attention}
ATTENDS = ["linear_fwd", "attention_qkvpacked_fwd", "linear_fwd"]
VARIANTS = {
    "attention": ("Attention", {}, ATTENDS),
    "a norm before the projection": ("Attention", {"scale_norm": True}, [*ATTENDS[:2], "layer_norm_fwd", "linear_fwd"]),
    "QK-norm, gate": (
        "Attention",
        {"qk_norm": True, "gated": True},
        ["linear_fwd", "attention_prepare_fwd", "attention_prepare_fwd", "attention_fwd", "mul.Tensor", "linear_fwd"],
    ),
    # The residual sums and LayerScale are inside.
    "block": ("Block", {}, ["layer_norm_fwd", *ATTENDS, "layer_norm_fwd", "mlp_fwd"]),
    "LayerScale": ("Block", {"init_values": 0.5}, ["layer_norm_fwd", *ATTENDS, "layer_norm_fwd", "mlp_fwd"]),
}


@pytest.mark.parametrize("children", ["children too", "alone"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernelized_attention_and_block_of_timm(variant, children, repository, kernel, mapping, kernelizable, device):
    """Outputs and gradients. A block is fused whether its children have the hub's forwards or their own."""
    layer, more, wanted = VARIANTS[variant]
    for name, cls in OF_BLOCKS.items():
        kernelizable(cls, name)
    kernelizable(getattr(vision_transformer, layer), layer)
    alone = {layer: {BACKEND: LocalLayerRepository(repository, layer_name=layer)}}
    with use_kernel_mapping(alone, inherit_mapping=False) if children == "alone" else contextlib.nullcontext():
        kernelized = kernelize(small(layer, **more).to(device), mode=Mode.TRAINING, device=BACKEND)
    bound = [name for name, child in kernelized.named_modules() if name and "forward" in vars(child)]
    assert bool(bound) == (layer == "Block" or "norm" in variant), "also of those that have no layer in the mapping"
    x = torch.randn(2, 10, DIM, device=device)
    with ops_called(kernel, (torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor)) as called:
        kernelized(x)
    assert called == wanted
    agrees(kernelized, small(layer, **more).to(device), x)


@pytest.mark.parametrize("layer", ["Attention", "Block"])
def test_masks(layer, kernel, mapping, kernelizable, device):
    kernelizable(getattr(vision_transformer, layer), layer)
    kernelized = kernelize(small(layer).to(device), mode=Mode.TRAINING, device=BACKEND, use_fallback=False)
    original, x = small(layer).to(device), torch.randn(2, 6, DIM, device=device)
    looks = torch.rand(2, 1, 6, 6, device=device) < 0.7
    looks[..., 0] = True
    for masks in ({"attn_mask": looks}, {"attn_mask": torch.randn(6, 6, device=device)}, {"is_causal": True}):
        with ops_called(kernel) as called:
            kernelized(x, **masks)
        assert "attention_qkvpacked_fwd" in called
        agrees(kernelized, original, x, **masks)
        assert not torch.allclose(kernelized(x, **masks), original(x))


def _hook(layer):
    layer.proj.register_forward_hook(lambda module, args, output: output * 2)


def _parameter(layer):
    layer.register_parameter("q_bias", None)  # as EVA's attention has


def _child(layer):
    layer.rope = nn.Identity()


def _norm(layer):
    layer.q_norm = nn.LayerNorm((6, DIM // 2))


@pytest.mark.parametrize("change", [_hook, _parameter, _child, _norm])
@pytest.mark.parametrize("layer", ["Attention", "Block"])
def test_what_is_not_timms_own_runs_its_own_forward(layer, change, kernel, mapping, kernelizable, device):
    kernelizable(getattr(vision_transformer, layer), layer)

    def build():
        made = small(layer)
        change(made if layer == "Attention" else made.attn)
        return made.to(device)

    kernelized, original = kernelize(build(), mode=Mode.TRAINING, device=BACKEND), build()
    x = torch.randn(2, 6, DIM, device=device)
    with ops_called(kernel) as called:
        kernelized(x)
    assert called == (["mlp_fwd"] if layer == "Block" else []), "a block calls its children"
    agrees(kernelized, original, x)


def test_a_subclass_keeps_its_own_forward(kernel, mapping, kernelizable, device):
    """kernels finds the name of the class above it."""
    norm = kernelize(timm.layers.LayerNorm2d(DIM).to(device), mode=Mode.TRAINING, device=BACKEND, use_fallback=False)
    kernelizable(nn.LayerNorm, "LayerNorm")
    norm = kernelize(norm, mode=Mode.TRAINING, device=BACKEND, use_fallback=False)
    assert norm.forward.__module__ == kernel.layers.__name__
    x = torch.randn(2, DIM, 3, 5, device=device)
    assert torch.equal(norm(x), timm.layers.LayerNorm2d(DIM).to(device)(x))


def test_kernelized_vision_model_of_transformers(kernel, mapping, kernelizable, device):
    """AIMv2's vision model. transformers offers its RMSNorms to the hub, but to some versions of kernels only."""
    transformers = pytest.importorskip("transformers")
    try:
        from transformers.models.aimv2 import modeling_aimv2
    except ImportError:
        pytest.skip("this transformers has no AIMv2")
    kernelizable(modeling_aimv2.Aimv2RMSNorm, "RMSNorm")
    config = transformers.Aimv2VisionConfig(
        hidden_size=DIM, intermediate_size=2 * DIM, num_hidden_layers=2, num_attention_heads=2, image_size=32,
        patch_size=16, use_head=False,
    )  # fmt: skip

    def build():
        torch.manual_seed(0)
        return modeling_aimv2.Aimv2VisionModel(config).eval().to(device)

    kernelized, images = (
        kernelize(build(), mode=Mode.TRAINING, device=BACKEND),
        torch.randn(2, 3, 32, 32, device=device),
    )
    with ops_called(kernel) as called:
        kernelized(images)
    assert set(called) == {"layer_norm_fwd"} and len(called) >= 2 * config.num_hidden_layers

    class Hidden(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).last_hidden_state

    agrees(Hidden(kernelized), Hidden(build()), images)


def test_adapter_on_a_child_is_called(kernel, mapping, kernelizable, device):
    """A fused forward would bypass it."""
    mlp = kernelize(timm.layers.Mlp(DIM, 2 * DIM).to(device), mode=Mode.TRAINING, device=BACKEND)
    mlp.fc1.register_forward_hook(lambda module, args, output: output * 0)
    with ops_called(kernel) as called:
        out = mlp(torch.randn(3, DIM, device=device))
    assert called == []
    assert torch.equal(out, mlp.fc2.bias.expand(3, -1))


def test_compiles_without_a_break(mapping, kernelizable, device):
    def build():
        torch.manual_seed(0)
        layers = nn.LayerNorm(DIM), timm.layers.Mlp(DIM, 2 * DIM), small("Attention"), small("Block", init_values=0.5)
        return nn.Sequential(*layers).to(device)

    for name in ("Attention", "Block"):
        kernelizable(getattr(vision_transformer, name), name)

    kernelized = kernelize(build(), mode=Mode.TRAINING | Mode.TORCH_COMPILE, device=BACKEND, use_fallback=False)
    compiled = torch.compile(kernelized, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, DIM, device=device)
    out, expected = compiled(x), kernelized(x)
    out.sum().backward()
    grads = [p.grad.clone() for p in kernelized.parameters()]
    kernelized.zero_grad()
    expected.sum().backward()
    assert torch.equal(out, expected)
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, kernelized.parameters(), strict=True))


def test_bad_input(repository, tmp_path, capsys):
    with pytest.raises(SystemExit, match="is not empty: give a new folder"):
        main(["--out", str(repository)])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"hub: cannot write to .*file"):
        main(["--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "new"), "--repo-id", "nobody"])
    assert "'nobody' is no OWNER/NAME" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_imports_become_relative():
    text = "from vitkernels import ops\n\ndef f():\n    from vitkernels.ops._x import y\n"
    assert hub.relative("ops/_a/b.py", text) == "from ... import ops\n\ndef f():\n    from ...ops._x import y\n"
    for line in ("import vitkernels.ops", "x = 1; from vitkernels import y"):
        with pytest.raises(ValueError, match=r"a\.py, line 1: cannot be made relative"):
            hub.relative("a.py", line)
