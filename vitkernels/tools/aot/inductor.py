"""Count what the kernels of ``torch.compile`` read and write.

AOTAutograd traces a function on fake tensors, with its backward, and divides the graph in two as ``torch.compile``
does. Inductor lowers and fuses both for the machine's GPU, or for an H100 where there is none, and counts each kernel's
bytes itself: per kernel, each buffer once. Nothing is compiled or run. This holds for the default mode at static
shapes; ``max-autotune`` may also choose products that apply an activation. A PyTorch without CUDA raises where Inductor
copies into a view, as for the gradient of RoPE: even a fake tensor of a GPU needs CUDA for that.
"""

from __future__ import annotations

import copy
import functools
import types
import unittest.mock
from collections.abc import Callable

import torch
import torch._dynamo.device_interface as interfaces
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils._triton import has_triton

from vitkernels._intercept import Access

H100 = types.SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, warp_size=32, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
)  # fmt: skip


class _Absent(interfaces.CudaInterface):
    """An H100 for whoever asks Inductor's interface to devices."""

    get_device_properties = staticmethod(lambda device=None: H100)
    get_compute_capability = staticmethod(lambda device=None: 90)
    is_bf16_supported = staticmethod(lambda including_emulation=False: True)
    is_available = staticmethod(lambda: True)

    class Worker(interfaces.CudaInterface.Worker):
        get_device_properties = staticmethod(lambda device=None: H100)
        current_device = staticmethod(lambda: 0)


class _Fused(Exception):
    """All that is wanted of Inductor is known."""


def compiled_kernels(
    function: Callable[..., Tensor], tensors: object, *, train: bool
) -> list[tuple[str, str, list[Access], int]]:
    """Return each kernel of ``torch.compile(function)``: ``forward`` or ``backward``, its ops, its accesses, its FLOPs.

    An access counts in elements of two bytes, so that a statistic in fp32 counts twice. FLOPs are those of products and
    attention.

    Args:
        function: Called with ``tensors``; returns one tensor.
        tensors: The arguments, of any device: a tuple in which tensors may be nested. Only their shapes matter.
        train: Also count the backward, for all of ``tensors`` that require a gradient.
    """
    interfaces.get_interface_for_device("cpu")  # fills the table, which is then patched
    fake_mode = FakeTensorMode()
    found = []

    def schedule(phase: str, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        runs = make_boxed_func(copy.deepcopy(graph).forward)  # on fake tensors; Inductor changes the graph
        # The autograd of a PyTorch without CUDA cannot trace for a GPU: only now all moves to one.
        with fake_mode, torch.no_grad():
            inputs = [_alike(t, "cuda") if isinstance(t, Tensor) else t for t in inputs]
            for node in graph.graph.nodes:
                if "device" in node.kwargs:
                    node.update_kwarg("device", torch.device("cuda"))
            FakeTensorProp(graph, fake_mode).propagate_dont_convert_inputs(*inputs)
        ours: list[tuple[str, str, list[Access], int]] = []

        def note(nodes: list) -> None:
            ours.extend([(phase, _name(node), _accesses(node), node.estimate_flops() or 0) for node in nodes])
            raise _Fused

        absent = {} if torch.cuda.is_available() else {"cuda": _Absent}
        has_triton.cache_clear()  # it answers by the devices that were there when it was first asked
        with (
            torch.no_grad(),
            config.patch(_post_fusion_custom_pass=note),
            unittest.mock.patch.dict(interfaces.device_interfaces, absent),
        ):
            try:
                compile_fx_inner(graph, inputs, is_backward=phase == "backward", is_inference=not train)
            except Exception:  # Inductor wraps _Fused in its own
                if not ours:
                    raise
        found.extend(kernel for kernel in ours if kernel[2])
        return runs

    with fake_mode, torch.set_grad_enabled(train):
        tensors = tree_map_only(Tensor, _alike, tensors)
        compiled = aot_function(
            function,
            functools.partial(schedule, "forward"),
            functools.partial(schedule, "backward"),
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
        out = compiled(*tensors)
        if train:
            wanting = [t for t in tree_leaves(tensors) if isinstance(t, Tensor) and t.requires_grad]
            torch.autograd.grad(out, wanting, torch.empty_like(out))
    return found


def _alike(t: Tensor, device: str = "cpu") -> Tensor:
    alike = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    return alike.requires_grad_(t.requires_grad and device == "cpu")


def _name(node) -> str:
    """Return the op that a kernel of Inductor calls, or the ops that it fuses."""
    called = getattr(node.node, "op_overload", None)
    origins = [origin for part in node.get_nodes() for origin in part.node.get_origins()]
    ops = [called] if called else [origin.meta.get("original_aten", origin.target) for origin in origins]
    names = (op.overloadpacket.__name__ for op in ops if isinstance(op, torch._ops.OpOverload) and not op.is_view)
    return ", ".join(dict.fromkeys(names))


def _accesses(node) -> list[Access]:
    accesses = []
    for written in (False, True):
        found = node.get_read_write_buffer_accesses(include_reads=not written, include_writes=written)
        accesses += [Access(None, size // 2, written) for size in found.values()]
    return accesses
