"""What each of two processes runs for test_parallelize.py."""

import copy
import pickle

import conftest  # noqa: F401  sets up the emulated GPU and torchvision, before timm is imported
import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_workers import Kept, Sent
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import vitkernels
from vitkernels.models import VisionTransformer

SMALL = {"embed_dim": 48, "num_heads": 4, "depth": 2, "num_classes": 5}
TIMM = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "init_values": 0.5, "qk_norm": True}),
    "dinov2": ("vit_giant_patch14_reg4_dinov2", {"img_size": 28}),
    "eva": ("eva02_tiny_patch14_224", {"img_size": 28}),
    "rope": ("vit_small_patch16_rope_mixed_224", {"img_size": 32}),
    "swiglu": ("vit_small_plus_patch16_dinov3.lvd1689m", {"img_size": 32}),
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in TIMM:
        timm_name, options = TIMM[name]
        model = timm.create_model(timm_name, **SMALL, **options)
    elif name == "own":
        model = VisionTransformer(img_size=32, patch_size=16, **SMALL)
    else:
        import transformers

        config = getattr(transformers, f"{name}Config")(
            image_size=32, patch_size=16, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=96, attn_implementation="sdpa",
        )  # fmt: skip
        model = getattr(transformers, f"{name}Model")(config)
    model = model.double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


NAMES = (*TIMM, "own", "ViT", "DINOv3ViT")
SHARING = (*TIMM, "own")  # whose blocks can share their tokens out


def images(model: nn.Module, batch: int = 3) -> torch.Tensor:
    side = 28 if getattr(getattr(model, "patch_embed", None), "patch_size", None) == (14, 14) else 32
    return torch.randn(batch, 3, side, side, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def output_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out.last_hidden_state


def gradients(model: nn.Module, like: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of ``model``, which may be sharded, in the shapes of those of ``like``."""
    shapes = {name: p.shape for name, p in like.named_parameters()}
    found = {name: p.grad for name, p in model.named_parameters()}
    return {
        name: None if g is None else (g.full_tensor() if isinstance(g, DTensor) else g).reshape(shapes[name])
        for name, g in found.items()
    }


def parallel(model: nn.Module, mesh: DeviceMesh, **options: bool) -> tuple[nn.Module, vitkernels.Report]:
    model = copy.deepcopy(model)
    vitkernels.accelerate(model)
    return model, vitkernels.parallelize(model, mesh, **options)


def run(model: nn.Module, like: nn.Module, batch: int = 3) -> dict:
    parameters = {(p.to_local() if isinstance(p, DTensor) else p).data_ptr() for p in model.parameters()}
    with Kept(parameters) as kept, Sent() as sent:
        out = output_of(model, images(like, batch))
        out.square().mean().backward()
    return {
        "output": out.detach(), "gradients": gradients(model, like), "sent": dict(sent.bytes), "kept": kept.total,
    }  # fmt: skip


def agreement(name: str, mesh: DeviceMesh) -> dict:
    whole = model_of(name)
    sharded, report = parallel(whole, mesh)
    results = {"swapped": len(report.swapped), "kept": [entry.reason for entry in report.kept]}
    shards = [p for p in sharded.parameters() if isinstance(p, DTensor)]
    results["own shards"], results["all shards"] = (
        sum(p.to_local().nbytes for p in shards),
        sum(p.nbytes for p in shards),
    )
    blocks = [p for name, p in whole.named_parameters() if ("blocks" in name or "layer" in name) and p.ndim > 1]
    results["matrices of blocks"] = sum(p.nbytes for p in blocks)
    for backend in ("torch", "emulated"):
        sharded.zero_grad()
        with vitkernels.use_backend(backend):
            results[backend] = run(sharded, whole)
    results["plain"] = run(whole, whole)
    return results


def sequence(name: str, mesh: DeviceMesh) -> dict:
    """With sequence parallelism; a batch of 3 then runs without."""
    whole = model_of(name)
    model, _ = parallel(whole, mesh, sequence=True)
    results = {"plain": run(whole, whole, batch=4), "odd": output_of(model, images(whole)).detach()}
    for backend in ("torch", "emulated"):
        model.zero_grad()
        with vitkernels.use_backend(backend):
            results[backend] = run(model, whole, batch=4)
    with vitkernels.use_backend("emulated"):
        results["not shared"] = run(parallel(whole, mesh)[0], whole, batch=4)
    seen = []
    handle = model.blocks[0].register_forward_hook(lambda block, args, out: seen.append(out.full_tensor().detach()))
    model(images(whole, batch=4))
    handle.remove()
    whole.blocks[0].register_forward_hook(lambda block, args, out: seen.append(out.detach()))
    whole(images(whole, batch=4))
    return results | {"between": tuple(seen)}


def training(mesh: DeviceMesh, folder: str) -> dict:
    """Three steps as docs/tutorials/tensor-parallelism.md shows them, beside the whole model; then save and load."""
    whole = model_of("vit").train()
    sharded, _ = parallel(whole, mesh)
    results = {}
    for name, model in (("whole", whole), ("sharded", sharded)):
        parameters = list(model.parameters())
        shards = [p for p in parameters if isinstance(p, DTensor)]
        groups = [g for g in (shards, [p for p in parameters if not isinstance(p, DTensor)]) if g]
        optimizer = torch.optim.SGD([{"params": g} for g in groups], lr=1e-2, momentum=0.9, foreach=True)
        norms = []
        for _ in range(3):
            optimizer.zero_grad()
            output_of(model, images(whole)).square().mean().backward()
            parts = [get_total_norm([p.grad for p in g]) for g in groups]
            parts = [n.full_tensor() if isinstance(n, DTensor) else n for n in parts]
            norm = torch.linalg.vector_norm(torch.stack(parts))
            for g in groups:
                clip_grads_with_norm_(g, 0.1, norm)
            optimizer.step()
            norms.append(norm)
        state = vitkernels.full_state_dict(model)
        results[name] = {"state": {k: v.clone() for k, v in state.items()}, "norms": norms}
    dcp.save(get_model_state_dict(sharded), checkpoint_id=f"{folder}/checkpoint")
    again, _ = parallel(model_of("vit"), mesh)
    state = get_model_state_dict(again)
    dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
    set_model_state_dict(again, state)
    results["loaded"] = {k: v.clone() for k, v in vitkernels.full_state_dict(again).items()}
    again.load_state_dict({k: 2 * v for k, v in whole.state_dict().items()})
    results["twice"] = {k: v.clone() for k, v in vitkernels.full_state_dict(again).items()}
    vitkernels.restore(again)
    results["restored"] = dict(again.state_dict())
    results["class"] = type(again.blocks[0]).__qualname__
    results["pickle has ours"] = b"vitkernels" in pickle.dumps(again)
    return results


def error_of(call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def errors(mesh: DeviceMesh) -> dict:
    rank, found = dist.get_rank(), {}

    def sharded(**options) -> nn.Module:
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, **{**SMALL, **options})
        vitkernels.accelerate(model)
        vitkernels.parallelize(model, mesh)
        return model

    x = torch.zeros(1, 3, 32, 32)
    plain = timm.create_model("vit_tiny_patch16_224", img_size=32, **SMALL)
    found["not accelerated"] = error_of(lambda: vitkernels.parallelize(plain, mesh))
    found["no mesh"] = error_of(lambda: vitkernels.parallelize(plain, 2))
    found["two dims"] = error_of(lambda: vitkernels.parallelize(plain, init_device_mesh("cpu", (1, 2))))
    uneven = timm.create_model("vit_tiny_patch16_224", img_size=32, **{**SMALL, "num_heads": 3})
    vitkernels.accelerate(uneven)
    found["no block"] = error_of(lambda: vitkernels.parallelize(uneven, mesh, sequence=True))
    found["uneven"] = str([entry.reason for entry in vitkernels.parallelize(uneven, mesh).kept])
    found["twice"] = error_of(lambda: vitkernels.parallelize(sharded(), mesh))
    torch.manual_seed(rank)
    found["other seeds"] = error_of(lambda: sharded(drop_path_rate=0.5))
    found["patch dropout"] = error_of(lambda: sharded(patch_drop_rate=0.5))
    masked = timm.create_model("vit_tiny_patch16_224", img_size=32, **SMALL)
    vitkernels.accelerate(masked)
    masked.blocks[0].random_masking = lambda x: x  # as transformers' ViTMAE has it
    found["random masks"] = error_of(lambda: vitkernels.parallelize(masked, mesh))
    torch.manual_seed(0)
    found["attention dropout"] = error_of(lambda: sharded(attn_drop_rate=0.5)(x))
    found["dropout"] = error_of(lambda: sharded(proj_drop_rate=0.5)(x))
    found["second derivative"] = error_of(lambda: second_derivative(sharded(), x))
    hooked = sharded()
    hooked.blocks[1].attn.qkv.register_forward_hook(lambda *args: None)
    found["hook"] = error_of(lambda: hooked(x))
    vitkernels.accelerate(hooked)
    found["hook, accelerated again"] = error_of(lambda: hooked(x))
    found["fp8"] = error_of(lambda: vitkernels.accelerate(sharded(), precision="fp8", strict=True))
    strange = timm.create_model("vit_tiny_patch16_224", img_size=32, **SMALL)
    vitkernels.accelerate(strange)
    strange.blocks[0].attn.qkv.__class__ = type("Linear", (nn.Linear,), {"__module__": "elsewhere"})
    found["other Linear"] = vitkernels.parallelize(strange, mesh).kept[0].reason
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=16, depths=(2,), num_heads=(2,))
    vitkernels.accelerate(swin)
    found["windows"] = str([entry.module for entry in vitkernels.parallelize(swin, mesh).kept])
    wrong = sharded()
    found["shape"] = error_of(lambda: wrong.load_state_dict(sharded(embed_dim=96).state_dict()))
    state = sharded().state_dict()
    state = {key: torch.zeros(48, 144) if key.endswith("qkv.weight") else t for key, t in state.items()}
    found["transposed"] = error_of(lambda: wrong.load_state_dict(state))
    return found


def second_derivative(model: nn.Module, x: torch.Tensor) -> None:
    x = x.clone().requires_grad_()
    with vitkernels.use_backend("torch"), sdpa_kernel(SDPBackend.MATH):  # which PyTorch differentiates twice
        (grad,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
        grad.square().sum().backward()


def tied(mesh: DeviceMesh) -> tuple[list[str], dict[str, torch.Size]]:
    """Why a model with a tied weight keeps two MLPs whole; and the shapes of a model's weights, one MLP in it twice."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, **SMALL)
    vitkernels.accelerate(model)
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    reasons = [entry.reason for entry in vitkernels.parallelize(model, mesh).kept]
    vitkernels.accelerate(vitkernels.restore(model) and model)
    model.blocks[1].mlp = model.blocks[0].mlp
    vitkernels.parallelize(model, mesh)
    state = vitkernels.full_state_dict(model)
    assert not any(isinstance(t, DTensor) for t in state.values()), "full_state_dict left shards"
    return reasons, {key: t.shape for key, t in state.items() if key.endswith("mlp.fc1.weight")}


def layouts(mesh: DeviceMesh) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Buffers that differ between the processes and are expanded, transposed or empty, after ``parallelize``."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, **SMALL)
    vitkernels.accelerate(model)
    start = 10.0 * dist.get_rank()
    model.register_buffer("expanded", torch.arange(start, start + 3)[:, None].expand(3, 4000))
    model.register_buffer("transposed", torch.arange(start, start + 6).view(2, 3).t())
    model.register_buffer("empty", torch.zeros(0, 3))
    vitkernels.parallelize(model, mesh)
    return model.expanded, model.transposed, model.empty


def drops(mesh: DeviceMesh) -> tuple[torch.Tensor, ...]:
    """Outputs with DropPath in training from one seed: whole, sharded, and with sequence parallelism."""
    torch.manual_seed(0)
    whole = timm.create_model("vit_tiny_patch16_224", img_size=32, **SMALL, drop_path_rate=0.5).double().train()
    outs = []
    for model in (whole, parallel(whole, mesh)[0], parallel(whole, mesh, sequence=True)[0]):
        torch.manual_seed(5)
        with vitkernels.use_backend("torch"):
            outs.append(model(images(whole, batch=8)).detach())
    return tuple(outs)


def autocast(mesh: DeviceMesh) -> tuple[torch.Tensor, ...]:
    """Outputs under autocast, where the residual is fp32 and the branch bf16: sharded, whole; and that in fp64."""
    wide = model_of("vit")
    whole, x = copy.deepcopy(wide).float(), images(wide, batch=16)
    sharded, _ = parallel(whole, mesh)
    with torch.autocast("cpu", torch.bfloat16), vitkernels.use_backend("emulated"):
        out = sharded(x.float()).detach()
    with torch.autocast("cpu", torch.bfloat16):
        yardstick = whole(x.float()).detach()
    return out, yardstick, wide(x).detach()


def masks(mesh: DeviceMesh) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The gradients of masks that have heads, share them or lack them, by a sharded attention and a whole one."""
    whole = model_of("vit")
    sharded, _ = parallel(whole, mesh)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 48, dtype=torch.double, generator=generator)
    found = []
    for shape in ((3, 4, 5, 5), (3, 1, 5, 5), (5, 5)):
        mask = torch.randn(shape, dtype=torch.double, generator=generator, requires_grad=True)
        for backend in ("torch", "emulated"):
            with vitkernels.use_backend(backend):
                outs = [model.blocks[0].attn(x, attn_mask=mask) for model in (sharded, whole)]
            found.append(tuple(torch.autograd.grad(out.square().sum(), mask)[0] for out in outs))
    return found


def compiled(mesh: DeviceMesh) -> tuple[torch.Tensor, ...]:
    whole = model_of("vit")
    x = images(whole, batch=4)
    outs = [whole(x).detach()]
    for sequence in (False, True):
        sharded, _ = parallel(whole, mesh, sequence=sequence)
        for block in sharded.blocks:
            block.compile(backend="aot_eager")
        outs.append(sharded(x).detach())
    return tuple(outs)


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    results = {name: agreement(name, mesh) for name in NAMES}
    results["sequence"] = {name: sequence(name, mesh) for name in SHARING}
    results["training"] = training(mesh, folder)
    results["errors"] = errors(mesh)
    results["drops"] = drops(mesh)
    results["autocast"] = autocast(mesh)
    results["masks"] = masks(mesh)
    results["tied"] = tied(mesh)
    results["layouts"] = layouts(mesh)
    results["compiled"] = compiled(mesh)
    torch.save(results, f"{folder}/results{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def work_on_four(rank: int, world: int, folder: str) -> None:
    """FSDP2 over the other dimension of a mesh; and the checkpoint of two processes on four."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store4", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    whole = model_of("vit")
    sharded, _ = parallel(whole, mesh["tp"])
    for block in (*sharded.blocks, sharded):
        fully_shard(
            block,
            mesh=mesh["dp"],
            shard_placement_fn=lambda p: Shard(1) if isinstance(p, DTensor) and p.ndim == 3 else None,
        )
    x = images(whole, batch=4)
    with vitkernels.use_backend("emulated"):
        output_of(sharded, x.chunk(2)[mesh.get_local_rank("dp")]).square().mean().backward()
    output_of(whole, x).square().mean().backward()
    results = {"gradients": gradients(sharded, whole), "expected": gradients(whole, whole)}
    results["state"], results["expected state"] = vitkernels.full_state_dict(sharded), whole.state_dict()
    again, _ = parallel(model_of("vit"), init_device_mesh("cpu", (4,)))
    state = get_model_state_dict(again)
    dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
    set_model_state_dict(again, state)
    results["loaded"] = vitkernels.full_state_dict(again)
    if rank == 0:
        torch.save(results, f"{folder}/results_of_four.pt")
    dist.barrier()
    dist.destroy_process_group()
