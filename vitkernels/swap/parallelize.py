"""Tensor parallelism: shard the attentions and MLPs of a model over processes, by DTensor."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from vitkernels import layers
from vitkernels.layers import records, sharded
from vitkernels.swap import _rules
from vitkernels.swap._parts import part_of
from vitkernels.swap.report import Kept, Report, Swapped

# The layers of the library's own modules, which have no rule.
_OWN = {
    layers.Attention: sharded.ATTENTION,
    layers.Mlp: sharded.MLP,
    layers.SwiGLU: sharded.GATED_MLP,
    layers.SwiGLUPacked: sharded.PACKED_GATED_MLP,
}


class _Plan(NamedTuple):
    """A module to shard: its layers in front and behind, and how many layers are packed in the one in front."""

    module: nn.Module
    columns: list[nn.Linear]
    rows: nn.Linear
    packed: int


def parallelize(model: nn.Module, mesh: DeviceMesh, *, sequence: bool = False) -> Report:
    """Shard the attentions and MLPs of an accelerated ``model`` over the processes of ``mesh``, in place.

    Each process gets some heads and some hidden features (Megatron-LM, arXiv 1909.08053). All processes of the mesh
    must then run the model on the same input, and get the same output: a branch costs one all-reduce in the forward and
    one in the backward. All parameters and buffers become those of the mesh's first process. A sharded parameter is a
    DTensor; packed layers become (3, H · D, C) for queries, keys and values and (2, F, C) for gate and value, because
    each of them is sharded. ``load_state_dict`` takes whole weights, too; :func:`vitkernels.full_state_dict` returns
    them, and :func:`vitkernels.restore` makes the model whole again. Make the optimizer after this call.

    Args:
        model: A model after :func:`vitkernels.accelerate`, or of :mod:`vitkernels.models`; the same on all processes.
        mesh: One dimension of a device mesh, on the model's device: ``init_device_mesh("cuda", (8,))``, or
            ``mesh["tp"]``. The other dimensions may hold FSDP2, applied after this call.
        sequence: Also share the tokens out between the sharded layers (sequence parallelism, arXiv 2205.05198), where
            consecutive pre-norm blocks of timm's ViT and EVA or of :mod:`vitkernels.models` are sharded whole: norms,
            residuals and what they keep for the backward then take a process's own images alone, for the same traffic.
            Between these blocks the tokens are a DTensor; hooks see it. A batch that the number of processes does not
            divide runs without.

    Returns:
        Which attentions and MLPs were sharded, and which were not and why; these run whole on every process.

    Raises:
        TypeError: ``model`` is not a module, or ``mesh`` not a DeviceMesh.
        ValueError: The mesh has several dimensions; the model is sharded already, has FP8 layers, or parameters on
            another device; it draws random numbers, and the processes would draw different ones; nothing can be
            sharded, or with ``sequence`` no block. The model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"parallelize: expected a torch.nn.Module, got a {type(model).__name__}")
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"parallelize: mesh is a {type(mesh).__name__}; expected a torch.distributed DeviceMesh")
    if mesh.ndim != 1:
        raise ValueError(
            f'parallelize: the mesh has {mesh.ndim} dimensions; give the one for tensor parallelism: mesh["tp"]'
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, DTensor):
            raise ValueError(f"parallelize: {name} is a DTensor already; call parallelize first, then fully_shard")
        if tensor.device.type != mesh.device_type:
            raise ValueError(f"parallelize: {name} is on {tensor.device}, and the mesh on {mesh.device_type}")
    if any(records.runs_fp8(module) for module in model.modules()):
        raise ValueError("parallelize: the model runs in FP8, whose scales are of whole weights; restore it first")
    # How many modules hold each module and parameter.
    held = Counter(id(x) for m in model.modules() for x in (*m._modules.values(), *m._parameters.values()))
    plans, swapped, kept = [], [], []
    for path, module in model.named_modules():
        names = _names(module)
        if names is None:
            if part_of(module) in ("attention", "an MLP"):
                reason = "it is not swapped, or its fused forward takes no shards"
                kept.append(Kept(path, type(module).__name__, reason, known=True))
            continue
        plan = _plan(module, names, mesh.size(), held)
        if isinstance(plan, str):
            kept.append(Kept(path, type(module).__name__, plan, known=True))
        else:
            plans.append(plan)
            swapped.append(Swapped(path, type(module).__name__, f"{mesh.size()} shards"))
    if not plans:
        raise ValueError(
            f"parallelize: {type(model).__name__} has no attention or MLP that can be sharded over {mesh.size()}; call "
            f"vitkernels.accelerate first\n{Report((), tuple(kept)).rows()}"
        )
    blocks = _runs_of_blocks(model, {plan.module for plan in plans}) if sequence else []
    if sequence and not blocks:
        raise ValueError("parallelize: sequence is set, and no block's attention and MLP can both be sharded")
    _check_draws(model, mesh)
    _make_equal(model, mesh)
    for plan in plans:
        _shard(plan, mesh)
    for *first, last in blocks:
        for block in first:
            setattr(block, sharded.MARK, sharded.PASSES)
        setattr(last, sharded.MARK, sharded.LAST)
    return Report(tuple(swapped), tuple(kept))


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a sharded ``model`` with whole weights, as its library writes them.

    Every process of the mesh must call it, and gets all of it, on the model's device.
    """
    state = model.state_dict(keep_vars=True)
    # By the tensors: a module may have several paths, and wrappers change the keys.
    names = {
        id(parameter): name
        for module in model.modules()
        if sharded.MARK in vars(module)
        for name, parameter in module._parameters.items()
    }
    whole = {}
    for key, t in state.items():
        whole[key] = t.detach() if isinstance(t, Tensor) else t
        if isinstance(t, DTensor):
            whole[key] = _whole(whole[key], names[id(t)]) if id(t) in names else whole[key].full_tensor()
    return whole


def make_whole(module: nn.Module) -> None:
    """Undo :func:`parallelize` for one module: gather its layers' weights."""
    for layer in (module, *module.children()):
        if vars(layer).pop(sharded.MARK, None) is None:
            continue
        hooks = layer._load_state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if hook.hook is _shard_loaded]:
            del hooks[key]
        for name, parameter in layer._parameters.items():
            if isinstance(parameter, DTensor):
                whole = _whole(parameter.detach(), name)
                setattr(layer, name, nn.Parameter(whole, requires_grad=parameter.requires_grad))


def _whole(parameter: DTensor, name: str) -> Tensor:
    whole = parameter.full_tensor()
    packed = whole.ndim == (3 if name == "weight" else 2)
    return whole.flatten(0, 1) if packed else whole


def _names(module: nn.Module) -> sharded.Layers | None:
    cls = type(module)
    if cls in _OWN:
        return _OWN[cls]
    rule = _rules.RULES.get(cls)
    return rule.shards if rule is not None and cls is rule.fused else None


def _plan(module: nn.Module, names: sharded.Layers, size: int, held: Counter[int]) -> _Plan | str:
    """Return how to shard ``module`` over ``size`` processes, or why that cannot be."""
    children = module._modules
    columns = [children[name] for name in names.columns if children.get(name) is not None]
    rows = children[names.rows]
    packed = names.packed if len(columns) == 1 else 1
    for layer in (*columns, rows):
        if type(layer) is not nn.Linear:
            return f"one of its layers is a {type(layer).__module__}.{type(layer).__name__}, not torch's own Linear"
    if any(type(p) is not nn.Parameter for layer in (*columns, rows) for p in layer.parameters()):
        return "one of its weights is not a plain Parameter"
    if any(held[id(x)] > 1 for layer in (*columns, rows) for x in (layer, *layer.parameters())):
        return "another module holds one of its weights, too"
    for name in ("norm", "gate"):
        if not isinstance(children.get(name), (nn.Identity, type(None))):
            return f"its {name} reads the features of all processes"
    head = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", 1)
    for layer in columns:
        units, rest = divmod(layer.out_features, packed * head)
        if rest or units % size:
            what = "heads" if head > 1 else "hidden features"
            return f"its {units} {what} cannot be shared evenly by {size} processes"
    return _Plan(module, columns, rows, packed)


def _runs_of_blocks(model: nn.Module, shards: set[nn.Module]) -> list[list[nn.Module]]:
    """Return the runs of consecutive blocks, each in one container, that can pass their tokens on among themselves."""
    runs = []
    for container in model.modules():
        if not isinstance(container, (nn.Sequential, nn.ModuleList)):
            continue
        for can_share, run in itertools.groupby(container, lambda block: _can_share_tokens(block, shards)):
            runs += [list(run)] if can_share else []
    return runs


def _can_share_tokens(block: nn.Module, shards: set[nn.Module]) -> bool:
    rule = _rules.RULES.get(type(block))
    reads_block = rule is not None and type(block) is rule.fused and rule.products is records.block
    if not (type(block) is layers.Block or reads_block):
        return False
    children = block._modules
    norms = (children["norm1"], children["norm2"])
    return {children["attn"], children["mlp"]} <= shards and not any(isinstance(n, nn.Identity) for n in norms)


def _check_draws(model: nn.Module, mesh: DeviceMesh) -> None:
    """Raise if modules of ``model`` drop something and the processes would not draw the same."""
    rates = [getattr(m, name, 0) for m in model.modules() for name in ("p", "drop_prob", "prob")]
    drops = any(isinstance(rate, (int, float)) and 0 < rate <= 1 for rate in rates)
    if not drops and not any(hasattr(m, "random_masking") for m in model.modules()):  # transformers' ViTMAE
        return
    generator = torch if mesh.device_type == "cpu" else torch.get_device_module(mesh.device_type)
    state = generator.get_rng_state().to(torch.int64)
    seeds = (state * torch.arange(1, len(state) + 1)).sum().to(mesh.device_type)
    first = seeds.clone()
    dist.broadcast(first, group_src=0, group=mesh.get_group())
    differ = (first != seeds).to(torch.int64)
    dist.all_reduce(differ, group=mesh.get_group())
    if differ:
        raise ValueError(
            "parallelize: the model drops at random, and the processes would draw different numbers; seed all of them "
            "alike (torch.manual_seed)"
        )


def _make_equal(model: nn.Module, mesh: DeviceMesh) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            # As wide as in memory and contiguous: a broadcast writes as if each element had a place of its own.
            own = tensor.detach()[tuple(slice(None) if stride else slice(1) for stride in tensor.stride())]
            sent = own.contiguous()
            dist.broadcast(sent, group_src=0, group=mesh.get_group())
            if sent is not own:
                own.copy_(sent)


def _shard(plan: _Plan, mesh: DeviceMesh) -> None:
    for layer in plan.columns:
        _shard_layer(layer, mesh, "columns", plan.packed)
    _shard_layer(plan.rows, mesh, "rows")
    setattr(plan.module, sharded.MARK, "whole")


def _shard_layer(layer: nn.Linear, mesh: DeviceMesh, way: str, packed: int = 1) -> None:
    for name, parameter in layer._parameters.items():
        if parameter is None or (way == "rows" and name == "bias"):
            continue
        data = parameter.detach()
        data = data.unflatten(0, (packed, -1)) if packed > 1 else data
        shard = Shard(1 if way == "rows" or packed > 1 else 0)
        # All processes hold the same weights, so nothing needs to be sent.
        part = distribute_tensor(data, mesh, [shard], src_data_rank=None)
        setattr(layer, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
    setattr(layer, sharded.MARK, way)
    layer.register_load_state_dict_pre_hook(_shard_loaded)


def _shard_loaded(layer: nn.Module, state_dict: dict, prefix: str, *args: object) -> None:
    """Shard whole weights that ``load_state_dict`` is about to copy."""
    for name, parameter in layer._parameters.items():
        given = state_dict.get(prefix + name)
        if isinstance(parameter, DTensor) and isinstance(given, Tensor) and not isinstance(given, DTensor):
            packs = given.ndim == parameter.ndim - 1 and given.shape[1:] == parameter.shape[2:]
            if packs and given.numel() == parameter.numel():
                given = given.reshape(parameter.shape)
            if given.shape == parameter.shape:  # else load_state_dict names the sizes
                given = given.to(parameter.device)
                given = distribute_tensor(given, parameter.device_mesh, parameter.placements, src_data_rank=None)
            state_dict[prefix + name] = given
