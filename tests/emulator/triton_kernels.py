"""Small Triton kernels that the emulator is checked with."""

import triton
import triton.language as tl


@triton.jit
def matmul(
    a,
    b,
    c,
    M,
    N,
    K,
    sam,
    sak,
    sbk,
    sbn,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    OUT: tl.constexpr,
):
    pm, pn = tl.program_id(0), tl.program_id(1)
    rm, rn, rk = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), OUT)
    for k in range(0, K, BK):
        x = tl.load(
            a + rm[:, None] * sam + (k + rk)[None, :] * sak, mask=(rm < M)[:, None] & (k + rk < K)[None, :], other=0.0
        )
        y = tl.load(
            b + (k + rk)[:, None] * sbk + rn[None, :] * sbn, mask=(k + rk < K)[:, None] & (rn < N)[None, :], other=0.0
        )
        acc = tl.dot(x, y, acc, input_precision=PRECISION, out_dtype=OUT)
    tl.store(c + rm[:, None] * N + rn[None, :], acc, mask=(rm < M)[:, None] & (rn < N)[None, :])


@triton.jit
def chained(a, b, c, o, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr):
    """(a b) c, the first product's result the second's left operand, in registers."""
    rm, rn, rk, rd = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, BD)
    x = tl.load(a + rm[:, None] * BK + rk[None, :])
    y = tl.load(b + rk[:, None] * BN + rn[None, :])
    z = tl.load(c + rn[:, None] * BD + rd[None, :])
    s = tl.dot(x, y)
    tl.store(o + rm[:, None] * BD + rd[None, :], tl.dot(s.to(x.dtype), z))


@triton.jit
def softmax(x, y, M, N, BM: tl.constexpr, BN: tl.constexpr, AXIS: tl.constexpr):
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN)
    mask = (m < M)[:, None] & (n < N)[None, :]
    s = tl.load(x + m[:, None] * N + n[None, :], mask=mask, other=float("-inf"))
    s = tl.exp(s - tl.expand_dims(tl.max(s, AXIS), AXIS))
    tl.store(y + m[:, None] * N + n[None, :], s / tl.expand_dims(tl.sum(s, AXIS), AXIS), mask=mask)


@triton.jit
def transpose(x, y, M, N, BM: tl.constexpr, BN: tl.constexpr):
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    t = tl.load(x + m[:, None] * N + n[None, :], mask=(m < M)[:, None] & (n < N)[None, :])
    tl.store(y + n[:, None] * M + m[None, :], tl.trans(t), mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit
def reshapes(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    t = tl.reshape(tl.load(x + i), (B // 16, 16))
    t = tl.reshape(tl.trans(t), (4, 4, B // 16))
    t = tl.permute(t, (1, 2, 0))
    a, b = tl.split(tl.reshape(t, (B // 2, 2)))
    tl.store(y + i, tl.reshape(tl.join(b, a), (B,)))


@triton.jit
def divergent(x, y, N, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + i, mask=i < N, other=0)
    if tl.program_id(0) % 2 == 0:
        w = v
        for _ in range(3):
            w = w * 3 // 2 - tl.where(w > 7, w % 5, -w // 3)
    else:
        w = tl.cumsum(v, 0)
    tl.store(y + i, w, mask=i < N)


@triton.jit
def beyond(x, y, N, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(x + i + 1, mask=i < N, other=0.0), mask=i < N)


@triton.jit
def clash(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(x + i) + tl.program_id(0))
