"""Matrix products with a fused epilogue, used by linear.py and mlp.py.

    product         y = residual + γ · s · act(z),  z = alpha · (a b + u v) + t · bias
    product_dact    dz = s · alpha · (a b + u v) · act'(z),  with s · act(z) and Σ dz on the side

s and t are DropPath's scales of the rows of a sample. u v, of a low rank R, is the update of a layer by LoRA: R more
columns of a and rows of b, which lie elsewhere.

Shapes, as in a GEMM: a (M, K), b (K, N), u (M, R), v (R, N), any strides. Sums are fp32 (fp64 for fp64). On a GPU a
product without an epilogue goes to torch.mm (cuBLAS): the Triton kernel reaches 0.80 to 0.97 of its speed (H100, bf16),
and is worth it only if the epilogue saves a pass over memory. On sm_90 the kernels of _product_hopper.py compute large
products in 16 bits whose layouts suit TMA.

If possible, the epilogue processes its tile in parts of 32 columns: z, act(z) and the gradients of a whole tile would
take so many registers that an SM could hold only one program, and nothing would overlap with the epilogue.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels import runtime
from vitkernels.ops import _tile
from vitkernels.ops._product_config import choose_config
from vitkernels.ops._product_hopper import product_dact_hopper, product_hopper, suits, suits_low_rank
from vitkernels.ops._sums import new_shares, sum_shares
from vitkernels.ops._triton import tl, triton
from vitkernels.runtime import cdiv, dense_or, next_power_of_2, wide_dtype

MAX_ROW = 1 << 22  # elements from one row to the next


@triton.jit(do_not_specialize=["M", "rows_per_sample"])
def _product_kernel(
    a_ptr,  # (M, K)
    b_ptr,  # (K, N)
    u_ptr,  # (M, RANK), contiguous, with a RANK
    v_ptr,  # (RANK, N), contiguous, or (N, RANK) without V_BY_ROWS
    alpha_ptr,  # (1,), with HAS_ALPHA
    bias_ptr,  # (N,)
    gamma_ptr,  # (N,), LayerScale
    residual_ptr,  # (M, N)
    path_ptr,  # (samples,), with a PATH: scales act(z), or the bias
    z_ptr,  # (M, N), contiguous: alpha · (a b + u v) + bias, with SAVE_Z
    y_ptr,  # (M, N), contiguous: residual + gamma · act(z)
    stride_a_row,
    stride_a_col,
    stride_b_row,
    stride_b_col,
    stride_residual_row,
    rows_per_sample,
    M,
    N,
    K,
    HAS_ALPHA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SAVE_Z: tl.constexpr,
    PATH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGNED_M: tl.constexpr,
    RANK: tl.constexpr,
    V_BY_ROWS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    if ALIGNED_M:
        M = M // 16 * 16  # which tells the compiler
    pid_m, pid_n = _tile_of_program(M, N, BLOCK_M, BLOCK_N)
    first_m, first_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M - first_m, offs_n < N - first_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if RANK > 0:  # first, as behind the longer loop it would take registers of its own
        stride_v_row, stride_v_col = (N, 1) if V_BY_ROWS else (1, RANK)
        acc = _accumulate(
            acc, u_ptr + first_m * RANK, v_ptr + first_n * stride_v_col, RANK, 1, stride_v_row, stride_v_col,
            offs_m, offs_n, mask_m, mask_n, RANK, RANK % BLOCK_R == 0, PRECISION, BLOCK_R,
        )  # fmt: skip
    acc = _accumulate(
        acc, a_ptr + first_m * stride_a_row, b_ptr + first_n * stride_b_col,
        stride_a_row, stride_a_col, stride_b_row, stride_b_col,
        offs_m, offs_n, mask_m, mask_n, K, EVEN_K, PRECISION, BLOCK_K,
    )  # fmt: skip
    if HAS_ALPHA:
        acc *= tl.load(alpha_ptr).to(ACC)
    if PATH != "none":
        path = tl.load(path_ptr + (first_m + offs_m) // rows_per_sample, mask=mask_m, other=0.0).to(ACC)[:, None]
    first_out = first_m * N + first_n
    for part in tl.static_range(PARTS):
        z = _columns(acc, part, PARTS)
        offs_n = part * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
        mask_n = offs_n < N - first_n
        mask = mask_m[:, None] & mask_n[None, :]
        offs_out = offs_m[:, None] * N + offs_n[None, :]
        if HAS_BIAS:
            bias = tl.load(bias_ptr + first_n + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
            if PATH == "bias":
                z += path * bias
            else:
                z += bias
        if SAVE_Z:
            tl.store(z_ptr + first_out + offs_out, z.to(z_ptr.dtype.element_ty), mask=mask)
        y = _tile.activate(z, ACTIVATION)
        if PATH == "act":
            y *= path
        if HAS_GAMMA:
            y *= tl.load(gamma_ptr + first_n + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
        if HAS_RESIDUAL:
            residual_ptrs = residual_ptr + first_m * stride_residual_row + first_n
            residual_ptrs += offs_m[:, None] * stride_residual_row + offs_n[None, :]
            y += tl.load(residual_ptrs, mask=mask, other=0.0).to(ACC)
        tl.store(y_ptr + first_out + offs_out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "rows_per_sample"])
def _product_dact_kernel(
    a_ptr,  # (M, K), upstream gradient of the layer after the activation
    b_ptr,  # (K, N), that layer's weight
    u_ptr,  # (M, RANK), contiguous, with a RANK
    v_ptr,  # (RANK, N), contiguous, or (N, RANK) without V_BY_ROWS
    alpha_ptr,  # (1,), with HAS_ALPHA
    path_ptr,  # (samples,), with HAS_PATH
    z_ptr,  # (M, N), contiguous: pre-activations
    dz_ptr,  # (M, N), contiguous: path · alpha · (a b + u v) · act'(z)
    act_ptr,  # (M, N), contiguous: path · act(z), with SAVE_ACT
    dbias_ptr,  # (blocks of M, N): each block's column sums of dz, with SUM_DZ
    stride_a_row,
    stride_a_col,
    stride_b_row,
    stride_b_col,
    rows_per_sample,
    M,
    N,
    K,
    HAS_ALPHA: tl.constexpr,
    HAS_PATH: tl.constexpr,
    SAVE_ACT: tl.constexpr,
    SUM_DZ: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RANK: tl.constexpr,
    V_BY_ROWS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    pid_m, pid_n = _tile_of_program(M, N, BLOCK_M, BLOCK_N)
    first_m, first_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M - first_m, offs_n < N - first_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if RANK > 0:  # first, as behind the longer loop it would take registers of its own
        stride_v_row, stride_v_col = (N, 1) if V_BY_ROWS else (1, RANK)
        acc = _accumulate(
            acc, u_ptr + first_m * RANK, v_ptr + first_n * stride_v_col, RANK, 1, stride_v_row, stride_v_col,
            offs_m, offs_n, mask_m, mask_n, RANK, RANK % BLOCK_R == 0, PRECISION, BLOCK_R,
        )  # fmt: skip
    acc = _accumulate(
        acc, a_ptr + first_m * stride_a_row, b_ptr + first_n * stride_b_col,
        stride_a_row, stride_a_col, stride_b_row, stride_b_col,
        offs_m, offs_n, mask_m, mask_n, K, EVEN_K, PRECISION, BLOCK_K,
    )  # fmt: skip
    if HAS_ALPHA:
        acc *= tl.load(alpha_ptr).to(ACC)
    if HAS_PATH:
        path = tl.load(path_ptr + (first_m + offs_m) // rows_per_sample, mask=mask_m, other=0.0).to(ACC)[:, None]
        acc *= path
    first_out = first_m * N + first_n
    for part in tl.static_range(PARTS):
        da = _columns(acc, part, PARTS)
        offs_n = part * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
        mask_n = offs_n < N - first_n
        mask = mask_m[:, None] & mask_n[None, :]
        offs_out = offs_m[:, None] * N + offs_n[None, :]
        z = tl.load(z_ptr + first_out + offs_out, mask=mask, other=0.0).to(ACC)
        if SAVE_ACT:
            act = _tile.activate(z, ACTIVATION)
            if HAS_PATH:
                act *= path
            tl.store(act_ptr + first_out + offs_out, act.to(act_ptr.dtype.element_ty), mask=mask)
        dz = da * _tile.activate_grad(z, ACTIVATION)
        tl.store(dz_ptr + first_out + offs_out, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        if SUM_DZ:
            dbias = tl.sum(tl.where(mask, dz, 0.0), axis=0)
            tl.store(dbias_ptr + pid_m * N + first_n + offs_n, dbias, mask=mask_n)


@triton.jit
def _tile_of_program(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the tile (row, column) of this program.

    Programs go eight tiles down, then one across, so that both operands stay in L2.
    """
    GROUP: tl.constexpr = 8
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    first_m = pid // (GROUP * blocks_n) * GROUP
    height = tl.minimum(blocks_m - first_m, GROUP)
    pid_m = first_m + pid % height
    pid_n = pid % (GROUP * blocks_n) // height
    return pid_m.to(tl.int64), pid_n.to(tl.int64)


@triton.jit
def _accumulate(
    acc,
    a_ptr,
    b_ptr,
    stride_a_row,
    stride_a_col,
    stride_b_row,
    stride_b_col,
    offs_m,
    offs_n,
    mask_m,
    mask_n,
    K,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add one tile of a b to ``acc``; the pointers are at its first row and its first column.

    Offsets within a tile are 32 bits wide; 64 bits would take twice the registers.
    """
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + offs_m[:, None] * stride_a_row + offs_k[None, :] * stride_a_col
    b_ptrs = b_ptr + offs_k[:, None] * stride_b_row + offs_n[None, :] * stride_b_col
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs, mask=mask_m[:, None], other=0.0)
            b = tl.load(b_ptrs, mask=mask_n[None, :], other=0.0)
        else:
            mask_k = offs_k < K - start
            a = tl.load(a_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = _tile.dot(a, b, acc, PRECISION)
        a_ptrs += BLOCK_K * stride_a_col
        b_ptrs += BLOCK_K * stride_b_row
    return acc


@triton.jit
def _columns(x, PART: tl.constexpr, PARTS: tl.constexpr):
    """Return part PART of a tile's columns, split into PARTS equal parts; PARTS is a power of two."""
    if PARTS == 1:
        return x
    else:
        HALF: tl.constexpr = PARTS // 2
        left, right = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))
        if PART < HALF:
            return _columns(left, PART, HALF)
        else:
            return _columns(right, PART - HALF, HALF)


def product(
    a: Tensor,
    b: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    alpha: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    act_path: Tensor | None = None,
    bias_path: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    save_z: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return ``(residual + γ · s · act(z), z)`` with ``z = alpha · (a b + u v) + t · bias``, z empty unless ``save_z``.

    Args:
        a, b: (M, K) and (K, N), any strides, one dtype.
        out_dtype: Dtype of the first result; that of the operands if None.
        alpha: (1,).
        bias, gamma: (N,).
        residual: (M, N), unit stride along N.
        act_path, bias_path: s or t, (samples,), with M / samples rows each; only one of the two.
        low_rank: u (M, R) and v (R, N), any strides, of the dtype of a and b.
    """
    (M, K), N = a.shape, b.shape[1]
    a, b = within_reach(a), within_reach(b)
    out_dtype = out_dtype or a.dtype
    facts = runtime.device_facts(a.device)
    path = bias_path if act_path is None else act_path
    path_scales = "none" if path is None else "bias" if act_path is None else "act"
    fused = any(t is not None for t in (alpha, activation, gamma, residual, path, low_rank))
    low_rank = _dense(low_rank)
    tma = suits(a, b, out_dtype, residual, save_z) and suits_low_rank(b, low_rank)
    config = choose_config(M, N, K, a.dtype, kind="epilogue" if fused else "plain", facts=facts, tma=tma)
    # torch.mm supports out_dtype on NVIDIA GPUs only, in fp32, and without a bias.
    widened = out_dtype != a.dtype
    can_widen = torch.version.cuda and bias is None and out_dtype == torch.float32
    if config.provider == "torch" and not fused and (not widened or can_widen):
        if widened:
            y = torch.mm(a, b, out_dtype=out_dtype)
        else:
            y = torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
        return y, a.new_empty(0)
    y = torch.empty((M, N), dtype=out_dtype, device=a.device)
    z = torch.empty((M, N) if save_z else (0,), dtype=a.dtype, device=a.device)
    if y.numel() == 0:
        return y, z
    if config.provider == "gluon":
        product_hopper(
            config, a, b, y, z if save_z else None, alpha=alpha, bias=bias, activation=activation, gamma=gamma,
            residual=residual, path=path, path_scales=path_scales, low_rank=low_rank,
        )  # fmt: skip
        return y, z
    _product_kernel[(cdiv(M, config.block_m) * cdiv(N, config.block_n),)](
        a_ptr=a,
        b_ptr=b,
        **_low_rank(low_rank, a, config.block_k),
        alpha_ptr=a if alpha is None else alpha,
        bias_ptr=dense_or(bias, a),
        gamma_ptr=dense_or(gamma, a),
        residual_ptr=a if residual is None else residual,
        path_ptr=dense_or(path, a),
        z_ptr=z,
        y_ptr=y,
        stride_a_row=a.stride(0),
        stride_a_col=a.stride(1),
        stride_b_row=b.stride(0),
        stride_b_col=b.stride(1),
        stride_residual_row=0 if residual is None else residual.stride(0),
        rows_per_sample=1 if path is None else M // path.shape[0],
        M=M,
        N=N,
        K=K,
        HAS_ALPHA=alpha is not None,
        HAS_BIAS=bias is not None,
        HAS_GAMMA=gamma is not None,
        HAS_RESIDUAL=residual is not None,
        SAVE_Z=save_z,
        PATH=path_scales,
        ACTIVATION=activation or "none",
        ALIGNED_M=a.stride(0) == 1 and M % 16 == 0,  # a transposed a is loaded along M, as wide as its mask allows
        EVEN_K=K % config.block_k == 0,
        PRECISION=runtime.dot_precision(a.device),
        ACC=_tile.accumulator(a.dtype),
        PARTS=config.parts,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y, z


def product_dact(
    a: Tensor,
    b: Tensor,
    z: Tensor,
    activation: str | None,
    *,
    alpha: Tensor | None,
    path: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    save_act: bool,
    sum_dz: bool,
    sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(dz, s · act(z), Σ dz)`` with ``dz = s · alpha · (a b + u v) · act'(z)``: through an activation.

    Args:
        a, b: (M, K) and (K, N), any strides.
        z: (M, N), contiguous.
        alpha: (1,).
        path: s, (samples,): DropPath's scale of M / samples rows each.
        low_rank: u (M, R) and v (R, N), any strides.
        save_act, sum_dz: Whether to compute the second and the third result; they are empty otherwise.
        sum_dtype: Dtype of the third result; fp32 (fp64) if None.
    """
    (M, K), N = a.shape, b.shape[1]
    a, b = within_reach(a), within_reach(b)
    low_rank = _dense(low_rank)
    tma = suits(a, b, z.dtype, None, save_act) and suits_low_rank(b, low_rank)
    config = choose_config(M, N, K, a.dtype, kind="dact", facts=runtime.device_facts(a.device), tma=tma)
    blocks_m = cdiv(M, config.block_m)
    dz = torch.empty_like(z)
    act = torch.empty_like(z) if save_act else z.new_empty(0)
    shares, (dbias,) = new_shares([sum_dz], blocks_m, N, wide_dtype(z.dtype), z.device)
    if M > 0 and config.provider == "gluon":
        product_dact_hopper(
            config, a, b, z, dz, act if save_act else None, dbias if sum_dz else None, alpha=alpha,
            path=path, activation=activation, low_rank=low_rank,
        )  # fmt: skip
    elif M > 0:
        _product_dact_kernel[(blocks_m * cdiv(N, config.block_n),)](
            a_ptr=a,
            b_ptr=b,
            **_low_rank(low_rank, a, config.block_k),
            alpha_ptr=a if alpha is None else alpha,
            path_ptr=dense_or(path, a),
            z_ptr=z,
            dz_ptr=dz,
            act_ptr=act,
            dbias_ptr=dbias,
            stride_a_row=a.stride(0),
            stride_a_col=a.stride(1),
            stride_b_row=b.stride(0),
            stride_b_col=b.stride(1),
            rows_per_sample=1 if path is None else M // path.shape[0],
            M=M,
            N=N,
            K=K,
            HAS_ALPHA=alpha is not None,
            HAS_PATH=path is not None,
            SAVE_ACT=save_act,
            SUM_DZ=sum_dz,
            ACTIVATION=activation or "none",
            EVEN_K=K % config.block_k == 0,
            PRECISION=runtime.dot_precision(a.device),
            ACC=_tile.accumulator(a.dtype),
            PARTS=config.parts,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return dz, act, *sum_shares(shares, [sum_dz], [sum_dtype or shares.dtype])


def _low_rank(operands: tuple[Tensor, Tensor] | None, other: Tensor, block_k: int) -> dict[str, object]:
    """Return the kernels' arguments about u and v, which :func:`_dense` gave; ``other`` stands for what is not there.

    A rank and the strides that follow from it are constants, as only then loads of a few elements a row are wide.
    """
    if operands is None:
        return {"u_ptr": other, "v_ptr": other, "RANK": 0, "V_BY_ROWS": True, "BLOCK_R": 16}
    u, v = operands
    rank = u.shape[1]
    block = max(16, min(block_k, next_power_of_2(rank)))
    return {"u_ptr": u, "v_ptr": v, "RANK": rank, "V_BY_ROWS": v.is_contiguous(), "BLOCK_R": block}


def _dense(operands: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    """Return u contiguous, and v contiguous or the transpose of what is."""
    if operands is None:
        return None
    u, v = operands
    return u.contiguous(), v if v.t().is_contiguous() else v.contiguous()


def within_reach(matrix: Tensor) -> Tensor:
    """Return ``matrix``, or a contiguous copy if offsets within a tile of 256 rows and columns would overflow 32 bits.

    Raises:
        NotImplementedError: Its rows are so long that a copy would not help.
    """
    if max(matrix.stride()) < MAX_ROW:
        return matrix
    if matrix.shape[1] >= MAX_ROW:
        raise NotImplementedError(f"a matrix has {matrix.shape[1]} columns; products take fewer than {MAX_ROW}")
    return matrix.contiguous()
