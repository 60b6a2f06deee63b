"""Autograd Functions of attention."""

from __future__ import annotations

import torch

from vitkernels import runtime
from vitkernels.ops._attention.operands import AttentionWanted
from vitkernels.ops._attention.prepare import prepare_fwd
from vitkernels.ops._attention.registered import (
    attention_biased_bwd,
    attention_bwd,
    attention_fwd,
    attention_prepared_bwd,
    attention_qkvpacked_biased_bwd,
    attention_qkvpacked_bwd,
    attention_qkvpacked_fwd,
)
from vitkernels.ops._once import once_differentiable


class AttentionFunction(torch.autograd.Function):
    """Autograd for separate q, k and v, (B, H, N, D) each, or (T, H, D) with ``starts``, a mask and a bias of keys."""

    @staticmethod
    def forward(ctx, q, k, v, mask, key_bias, seed, starts, scale, is_causal, dropout_p, max_seqlen):
        o, lse = attention_fwd(
            q, k, v, scale, starts is None, mask, seed, is_causal, dropout_p, starts, max_seqlen, key_bias
        )
        ctx.save_for_backward(q, k, v, o, lse, key_bias, mask, seed, starts)
        ctx.emulated = runtime.emulated_arch()
        ctx.options = (scale, is_causal, dropout_p, max_seqlen)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, do):
        *tensors, key_bias, mask, seed, starts = saved
        scale, is_causal, dropout_p, max_seqlen = ctx.options
        needs_q, needs_k, needs_v, needs_mask, needs_key_bias, *_ = ctx.needs_input_grad
        wanted = list(AttentionWanted(needs_q, needs_k or needs_v, needs_mask))
        options = (starts is None, mask, seed, is_causal, dropout_p, starts, max_seqlen)
        if key_bias is None:
            dq, dk, dv, dmask = attention_bwd(do, *tensors, scale, wanted, *options)
        else:
            dq, dk, dv, dmask, dkey_bias = attention_biased_bwd(
                do, *tensors, key_bias, scale, [*wanted, needs_key_bias], *options
            )
        return (
            dq if needs_q else None,
            dk if needs_k else None,
            dv if needs_v else None,
            dmask.to(mask.dtype) if needs_mask else None,
            dkey_bias.to(key_bias.dtype) if needs_key_bias else None,
            *[None] * 6,
        )


class AttentionQkvpackedFunction(torch.autograd.Function):
    """Autograd for packed qkv, (B, N, 3, H, D), a mask, and QK-norm and RoPE of q and k."""

    @staticmethod
    def forward(
        ctx, qkv, mask, q_weight, q_bias, k_weight, k_bias, cos, sin, seed, scale, is_causal, dropout_p,
        q_norm, q_eps, k_norm, k_eps, interleaved, prefix,
    ):  # fmt: skip
        q, k, v = qkv.unbind(2)
        if q_norm or cos is not None:
            q = prepare_fwd(q, q_weight, q_bias, cos, sin, q_norm, q_eps, interleaved, prefix)
        if k_norm or cos is not None:
            k = prepare_fwd(k, k_weight, k_bias, cos, sin, k_norm, k_eps, interleaved, prefix)
        ctx.prepared = bool(q_norm or k_norm or cos is not None)
        if ctx.prepared:
            o, lse = attention_fwd(q, k, v, scale, False, mask, seed, is_causal, dropout_p)
        else:
            q = k = None
            o, lse = attention_qkvpacked_fwd(qkv, scale, mask, seed, is_causal, dropout_p)
        ctx.save_for_backward(qkv, q, k, o, lse, mask, seed, q_weight, q_bias, k_weight, k_bias, cos, sin)
        ctx.emulated = runtime.emulated_arch()
        ctx.options = (scale, is_causal, dropout_p, q_norm, q_eps, k_norm, k_eps, interleaved, prefix)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, do):
        qkv, q, k, o, lse, mask, seed, q_weight, q_bias, k_weight, k_bias, cos, sin = saved
        scale, is_causal, dropout_p, q_norm, q_eps, k_norm, k_eps, interleaved, prefix = ctx.options
        needs_qkv, needs_mask, *needed = ctx.needs_input_grad[:6]
        if ctx.prepared:
            dqkv, *sums, dmask = attention_prepared_bwd(
                do, qkv, qkv[:, :, 0] if q is None else q, qkv[:, :, 1] if k is None else k, o, lse, scale, mask, seed,
                is_causal, dropout_p, needs_mask, needed, q_weight, q_bias, q_norm, q_eps, k_weight, k_bias, k_norm,
                k_eps, cos, sin, interleaved, prefix,
            )  # fmt: skip
        else:
            dqkv, _, dmask = attention_qkvpacked_bwd(
                do, qkv, o, lse, scale, None, needs_mask, mask, seed, is_causal, dropout_p
            )
            sums = [None] * 4
        parameters = (q_weight, q_bias, k_weight, k_bias)
        return (
            dqkv if needs_qkv else None,
            dmask.to(mask.dtype) if needs_mask else None,
            *(s.to(p.dtype) if n else None for s, p, n in zip(sums, parameters, needed, strict=True)),
            *[None] * 12,
        )


class AttentionQkvpackedBiasedFunction(torch.autograd.Function):
    """Autograd for packed qkv, (B, N, 3, H, D), a mask and a bias of keys."""

    @staticmethod
    def forward(ctx, qkv, mask, key_bias, seed, scale, is_causal, dropout_p):
        o, lse = attention_qkvpacked_fwd(qkv, scale, mask, seed, is_causal, dropout_p, None, 0, key_bias)
        ctx.save_for_backward(qkv, o, lse, key_bias, mask, seed)
        ctx.emulated = runtime.emulated_arch()
        ctx.options = (scale, is_causal, dropout_p)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, do):
        qkv, o, lse, key_bias, mask, seed = saved
        scale, is_causal, dropout_p = ctx.options
        needs_qkv, needs_mask, needs_key_bias, *_ = ctx.needs_input_grad
        dqkv, dmask, dkey_bias = attention_qkvpacked_biased_bwd(
            do, qkv, o, lse, key_bias, scale, needs_mask, needs_key_bias, mask, seed, is_causal, dropout_p
        )
        return (
            dqkv if needs_qkv else None,
            dmask.to(mask.dtype) if needs_mask else None,
            dkey_bias.to(key_bias.dtype) if needs_key_bias else None,
            *[None] * 4,
        )
