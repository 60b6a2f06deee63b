"""Tensors of more than 2³¹ elements, and grids of more than 65,535 programs.

Four witnesses. The launchers' choice and the compiler's address arithmetic, for tensors that need no memory
(giant_launches.py). Kernels on an emulated GPU, on rows that lie more than 2³¹ elements apart, in sparse files: an
address that wraps is another tensor's or nobody's. And a GPU, where there is one with the memory.
"""

import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitkernels import ops, reference
from vitkernels.ops._product import within_reach
from vitkernels.testing import check_op

triton = pytest.importorskip("triton", reason="nothing compiles without Triton")
ROOT = Path(__file__).parents[2]
KERNELS_WITH_A_CHOICE = ("_attention_", "_prepare_", "_patch_embed_")


@pytest.fixture(scope="module")
def launches():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("giant_launches.py")
    ran = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-5000:]
    return json.loads(ran.stdout)


@pytest.mark.timeout(900)
def test_grids_have_one_axis(launches):
    """Axes 1 and 2 end at 65,535; all programs are on axis 0, which ends at 2³¹ − 1."""
    assert {len(row["grid"]) for row in launches} == {1}
    assert 65_535 < max(row["grid"][0] for row in launches) < 2**31


@pytest.mark.timeout(900)
def test_launchers_choose_the_width_of_offsets(launches):
    chosen = [row for row in launches if row["kernel"].startswith(KERNELS_WITH_A_CHOICE)]
    chosen = [row for row in chosen if "hopper" not in row["kernel"]]  # TMA takes coordinates, no offsets
    assert len(chosen) > 20
    for row in chosen:
        wide = "far" in row["case"]
        assert row["index"] == ("int64" if wide else "int32"), row
    # A tile of at most 256 rows is addressed in 32 bits from a base in 64.
    products = [row for row in launches if "product" in row["kernel"]]
    assert len(products) > 5
    for row in products:
        assert 256 * row["largest_stride"] < 2**31, row


@pytest.mark.timeout(900)
def test_the_compiler_addresses_in_64_bits(launches):
    """But where the launcher saw that 32 suffice."""
    for row in launches:
        assert row["address_bits"] == 64 or row["index"] == "int32", row


def test_matrices_out_of_reach_are_copied():
    near, far = (torch.empty_strided((3, 4), (stride, 1), device="meta") for stride in ((1 << 22) - 1, 1 << 22))
    assert within_reach(near) is near
    assert within_reach(far).stride() == (4, 1)
    with pytest.raises(NotImplementedError, match="4194304 columns; products take fewer"):
        within_reach(torch.empty(2, 1 << 22, device="meta"))


@pytest.fixture
def spread(tmp_path):
    """Copies a tensor to a sparse file in which what follows in one dim lies ``stride`` elements on."""
    names = itertools.count()

    def far(x, dim, stride):
        strides = list(x.contiguous().stride())
        strides[dim] = stride
        size = 1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))
        assert size > 2**31
        file = tmp_path / str(next(names))
        with file.open("wb") as f:
            f.truncate(size * x.element_size())
        storage = torch.from_file(str(file), shared=True, size=size, dtype=x.dtype)
        file.unlink()  # the mapping keeps it
        return storage.as_strided(x.shape, strides).copy_(x)

    if torch.cuda.is_available():
        pytest.skip("the emulated GPU's test; a real one has that below")
    return far


def half(*shape):
    return torch.randn(shape).half()


def test_layer_norm_of_far_rows(spread):
    # The last row is another program's than the first: both products of a row's number and the stride must be wide.
    x = spread(half(9, 40), 0, 2**28 + 8).requires_grad_()
    w = half(40).requires_grad_()
    upstream = lambda y: spread(torch.randn_like(y), 0, 2**28 + 8)  # noqa: E731
    check_op(ops.layer_norm, reference.layer_norm, {"x": x, "weight": w}, upstream=upstream)


def test_layer_norm_behind_a_large_offset(spread):
    x = spread(half(2, 40), 0, 2**31 + 16)[1:]
    assert x.storage_offset() > 2**31
    check_op(ops.layer_norm, reference.layer_norm, {"x": x.requires_grad_()})


@pytest.mark.parametrize("dim", [0, 1])
def test_linear_of_far_rows_or_columns(dim, spread):
    x = spread(half(9, 24), dim, 2**31 // (8, 23)[dim] + 8).requires_grad_()
    check_op(ops.linear, reference.linear, {"x": x, "weight": half(7, 24).requires_grad_()})


@pytest.mark.parametrize(("N", "D"), [(5, 16), (70, 16), (270, 16)], ids=["windows", "rows", "blocks"])
def test_attention_of_far_tokens(N, D, spread):
    tensors = {n: spread(half(1, 1, N, D), 2, 2**31 // (N - 1) + 8).requires_grad_() for n in "qkv"}
    check_op(ops.attention, reference.attention, tensors)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_patch_embed_of_far_images_channels_and_rows(dim, spread):
    images = spread(half(2, 2, 4, 6), dim, 2**31 // (1, 1, 3)[dim] + 8).requires_grad_()
    check_op(ops.patch_embed, reference.patch_embed, {"images": images, "weight": half(5, 2, 2, 3).requires_grad_()})


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 60 << 30,
    reason="needs a GPU with 60 GiB",
)
@pytest.mark.parametrize("op", ["layer_norm", "linear", "attention", "patch_embed"])
def test_giants_on_a_gpu(op):
    """The last rows of a tensor of more than 2³¹ elements come out as they do by themselves."""

    def new(*shape):
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    function, shape, parameters = {
        "layer_norm": (ops.layer_norm, (2**20 + 8, 2049), ((2049,), (2049,))),
        "linear": (functools.partial(ops.linear, activation="gelu"), (2**21 + 8, 1025), ((64, 1025), (64,))),
        "attention": (ops.attention_qkvpacked, (60_000, 197, 3, 1, 64), ()),
        "patch_embed": (ops.patch_embed, (3600, 3, 448, 448), ((64, 3, 16, 16), (64,))),
    }[op]
    x, parameters = new(*shape), [new(*p) for p in parameters]
    assert x.numel() > 2**31
    with torch.no_grad():
        torch.testing.assert_close(function(x, *parameters)[-5:], function(x[-5:], *parameters))
