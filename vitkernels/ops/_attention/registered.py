"""Attention's registered ops: adapters for the launchers, references, and fake outputs."""

from __future__ import annotations

import itertools

import torch

from vitkernels import reference
from vitkernels.ops._attention.backward import attention_backward
from vitkernels.ops._attention.forward import attention_forward, forward_outputs
from vitkernels.ops._attention.operands import LOG2_E, AttentionWanted, Options
from vitkernels.ops._attention.prepare import prepare_backward
from vitkernels.ops._registry import reference_gradients, register

# Schema of Options, and of QK-norm and RoPE. PyTorch's dispatcher drops trailing arguments that have their default
# values, so the arguments used most often come first.
_OPTIONS = (
    "Tensor? mask=None, Tensor? seed=None, bool is_causal=False, float dropout_p=0.0, Tensor? starts=None, "
    "SymInt max_seqlen=0"
)
# The ops' arguments as first released, and the bias of keys behind them.
_KEY_BIAS = "Tensor? key_bias=None"
_SEPARATE_OPTIONS = f"bool heads_first=False, {_OPTIONS}"
_PREPARED = (
    "Tensor? q_weight, Tensor? q_bias, str q_norm, float q_eps, Tensor? k_weight, Tensor? k_bias, str k_norm, "
    "float k_eps, Tensor? cos, Tensor? sin, bool interleaved, int prefix"
)


def _forward(q, k, v, scale, *options):
    return attention_forward(q, k, v, Options(scale, *options))


def _outputs(q, k, v, scale, *options):
    return forward_outputs(q, k, v, Options(scale, *options))


def _separate_backward(do, q, k, v, o, lse, scale, needed, *options, dkey_bias=None):
    dq, dk, dv, dmask = _gradients(do, q, k, v, o, lse, scale, needed, *options)
    options, wanted = Options(scale, *options), AttentionWanted(*needed)
    do, q, k, v, o = options.tokens_first(do, q, k, v, o)
    outputs = options.tokens_first(dq) if wanted.dq else [None]
    outputs += options.tokens_first(dk, dv) if wanted.dkv else [None, None]
    _, computed = attention_backward(
        do, q, k, v, o, lse, options, *outputs, dkey_bias=dkey_bias, needs_dmask=wanted.dmask
    )
    return dq, dk, dv, computed if wanted.dmask else dmask


def _biased_backward(do, q, k, v, o, lse, key_bias, scale, needed, *options):
    needed, needs_key_bias = _biased_wanted(needed)
    options = _with_key_bias(key_bias, options)
    dkey_bias = _dkey_bias_of_heads(q, k, lse, Options(scale, *options)) if needs_key_bias else None
    grads = _separate_backward(do, q, k, v, o, lse, scale, needed, *options, dkey_bias=dkey_bias)
    return *grads, _sum_of_heads(dkey_bias, key_bias, lse)


def _biased_gradients(do, q, k, v, o, lse, key_bias, scale, needed, *options):
    needed, needs_key_bias = _biased_wanted(needed)
    grads = _gradients(do, q, k, v, o, lse, scale, needed, *_with_key_bias(key_bias, options))
    return *grads, lse.new_empty(key_bias.shape if needs_key_bias else (0,))


def _biased_wanted(needed):
    """Split ``needed``; the kernels that compute dk and dv also sum the gradient of a bias of keys."""
    *others, needs_key_bias = needed
    wanted = AttentionWanted(*others)
    return wanted._replace(dkv=wanted.dkv or needs_key_bias), needs_key_bias


def _with_key_bias(key_bias, options):
    """Put ``key_bias`` behind the options that a call gives, which leaves out the last ones if they have defaults."""
    return *options, *tuple(Options._field_defaults.values())[len(options) : -1], key_bias


def _dkey_bias_of_heads(q, k, lse, options):
    """Allocate the gradient of a bias of keys, (B, H, N_kv); zeros if some tokens may belong to no image."""
    B, _, H, _ = options.sizes(q)
    new = torch.empty if options.starts is None else torch.zeros
    return new((B, H, k.shape[options.dims[1]]), dtype=lse.dtype, device=lse.device)


def _sum_of_heads(dkey_bias, key_bias, lse):
    return lse.new_empty(0) if dkey_bias is None else dkey_bias.sum(1).view(key_bias.shape)


def _gradients(do, q, k, v, o, lse, scale, needed, *options):
    options, wanted = Options(scale, *options), AttentionWanted(*needed)
    new = torch.empty if options.starts is None else torch.zeros  # tokens may belong to no image
    grads = []
    for x, n in ((q, wanted.dq), (k, wanted.dkv), (v, wanted.dkv)):
        if n and options.heads_first:
            B, H, N, D = x.shape
            grads.append(torch.empty((B, N, H, D), dtype=x.dtype, device=x.device).transpose(1, 2))
        else:
            grads.append(new(x.shape if n else (0,), dtype=x.dtype, device=x.device))
    return *grads, _new_dmask(options.mask if wanted.dmask else None, lse)


def _new_dmask(mask, lse):
    return torch.empty((0,) if mask is None else mask.shape, dtype=lse.dtype, device=lse.device)


def _packed_forward(qkv, scale, *options):
    return _forward(*qkv.unbind(2), scale, False, *options)


def _packed_backward(do, qkv, o, lse, scale, sum_dtype, needs_dmask=False, *options, dkey_bias=None):
    dqkv, dqkv_sum, dmask = _packed_gradients(do, qkv, o, lse, scale, sum_dtype, needs_dmask, *options)
    sums, computed = attention_backward(
        do, *qkv.unbind(2), o, lse, Options(scale, False, *options), *dqkv.unbind(2),
        dkey_bias=dkey_bias, sums_dtype=sum_dtype, needs_dmask=needs_dmask,
    )  # fmt: skip
    return dqkv, dqkv_sum if sum_dtype is None else sums, computed if needs_dmask else dmask


def _packed_biased_backward(do, qkv, o, lse, key_bias, scale, needs_dmask, needs_key_bias, *options):
    options = _with_key_bias(key_bias, (False, *options))
    q, k, _ = qkv.unbind(2)
    dkey_bias = _dkey_bias_of_heads(q, k, lse, Options(scale, *options)) if needs_key_bias else None
    dqkv, _, dmask = _packed_backward(do, qkv, o, lse, scale, None, needs_dmask, *options[1:], dkey_bias=dkey_bias)
    return dqkv, dmask, _sum_of_heads(dkey_bias, key_bias, lse)


def _packed_biased_gradients(do, qkv, o, lse, key_bias, scale, needs_dmask, needs_key_bias, *options):
    dqkv, _, dmask = _packed_gradients(do, qkv, o, lse, scale, None, needs_dmask, *options)
    return dqkv, dmask, lse.new_empty(key_bias.shape if needs_key_bias else (0,))


def _packed_gradients(do, qkv, o, lse, scale, sum_dtype, needs_dmask=False, *options):
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dqkv_sum = torch.empty(qkv.shape[2:] if sum_dtype else (0,), dtype=sum_dtype or lse.dtype, device=qkv.device)
    return dqkv, dqkv_sum, _new_dmask(Options(scale, False, *options).mask if needs_dmask else None, lse)


def _prepared_backward(
    do, qkv, q, k, o, lse, scale, mask, seed, is_causal, dropout_p, needs_dmask, needed,
    q_weight, q_bias, q_norm, q_eps, k_weight, k_bias, k_norm, k_eps, cos, sin, interleaved, prefix,
):  # fmt: skip
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dq, dk, dv = dqkv.unbind(2)
    options = Options(scale, False, mask, seed, is_causal, dropout_p)
    _, dmask = attention_backward(do, q, k, qkv.select(2, 2), o, lse, options, dq, dk, dv, needs_dmask=needs_dmask)
    sums = []
    for i, dx, weight, norm, eps, needs in (
        (0, dq, q_weight, q_norm, q_eps, needed[:2]), (1, dk, k_weight, k_norm, k_eps, needed[2:]),
    ):  # fmt: skip
        if norm or cos is not None:  # in place: the program that writes a row is the only reader
            sums += prepare_backward(dx, qkv.select(2, i), weight, cos, sin, norm, eps, interleaved, prefix, dx, *needs)
        else:
            sums += [lse.new_empty(0), lse.new_empty(0)]
    return dqkv, *sums, dmask if needs_dmask else _new_dmask(None, lse)


def _fake_prepared_backward(do, qkv, q, k, o, lse, scale, mask, seed, is_causal, dropout_p, needs_dmask, needed, *_):
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    sums = (torch.empty(qkv.shape[-1] if n else 0, dtype=lse.dtype, device=qkv.device) for n in needed)
    return dqkv, *sums, _new_dmask(mask if needs_dmask else None, lse)


def _reference_output(q, k, v, mask, options):
    """Return o of q, k and v; ``mask`` replaces ``options.mask``, so that it can be an autograd leaf."""
    if options.starts is not None:
        return reference.attention_varlen(
            q, k, v, options.starts, scale=options.scale, is_causal=options.is_causal, key_bias=options.key_bias
        )
    if not options.heads_first:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    drawn = None
    if options.dropout_p:
        shape = (*q.shape[:3], k.shape[2])
        drawn = reference.dropout_scale(int(options.seed), shape, options.dropout_p).to(q.device)
    o = reference.attention(
        q, k, v, attn_mask=mask, key_bias=options.key_bias, scale=options.scale, is_causal=options.is_causal,
        dropout_scale=drawn,
    )  # fmt: skip
    return o if options.heads_first else o.transpose(1, 2)


def _reference_forward(q, k, v, scale, *options):
    o, lse = _outputs(q, k, v, scale, *options)
    options = Options(scale, *options)
    o = o.copy_(_reference_output(q, k, v, options.mask, options))
    q, k = options.tokens_first(q, k)
    bounds = [0, q.shape[1]] if options.starts is None else options.starts.tolist()
    lse.zero_()
    for start, end in itertools.pairwise(bounds):
        queries, keys = q[:, start:end].to(lse.dtype), k[:, start : k.shape[1] if options.starts is None else end]
        scores = torch.einsum("bmhd,bnhd->bhmn", queries, keys.to(lse.dtype)) * scale
        if options.key_bias is not None:
            scores = scores + options.key_bias[..., start : start + keys.shape[1]].view(-1, 1, 1, keys.shape[1])
        if options.is_causal:
            scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), float("-inf"))
        if options.mask is not None:
            if options.mask.dtype == torch.bool:
                scores = scores.masked_fill(~options.mask, float("-inf"))
            else:
                scores = scores + reference.added_mask(options.mask, lse.dtype)
        largest = scores.amax(-1, keepdim=True)
        empty = (largest == float("-inf")) & (options.mask is not None or options.key_bias is not None)
        shifted = scores - largest.masked_fill(empty, 0.0)
        log_total = shifted.logsumexp(-1).masked_fill(empty.squeeze(-1), 0.0) * LOG2_E
        largest = largest.masked_fill(empty, float("inf")).squeeze(-1)
        if options.mask_kind == "float":
            lse.copy_(torch.stack([largest, log_total], -1))
        else:
            lse[:, :, start:end] = largest * LOG2_E + log_total
    return o, lse


def _reference_backward(do, q, k, v, o, lse, scale, needed, *options):
    outputs = _gradients(do, q, k, v, o, lse, scale, needed, *options)
    options, wanted = Options(scale, *options), AttentionWanted(*needed)
    grads = reference_gradients(
        lambda q, k, v, mask: _reference_output(q, k, v, mask, options),
        (q, k, v, options.mask), (do,), (wanted.dq, wanted.dkv, wanted.dkv, wanted.dmask),
    )  # fmt: skip
    return tuple(output.copy_(grad) for output, grad in zip(outputs, grads, strict=True))


def _reference_biased_backward(do, q, k, v, o, lse, key_bias, scale, needed, *options):
    outputs = _biased_gradients(do, q, k, v, o, lse, key_bias, scale, needed, *options)
    options, (wanted, needs_key_bias) = Options(scale, *options), _biased_wanted(needed)
    grads = reference_gradients(
        lambda q, k, v, mask, bias: _reference_output(q, k, v, mask, options._replace(key_bias=bias)),
        (q, k, v, options.mask, key_bias), (do,),
        (wanted.dq, wanted.dkv, wanted.dkv, wanted.dmask, needs_key_bias),
    )  # fmt: skip
    return tuple(output.copy_(grad) for output, grad in zip(outputs, grads, strict=True))


def _reference_packed_biased_backward(do, qkv, o, lse, key_bias, scale, needs_dmask, needs_key_bias, *options):
    options = Options(scale, False, *options)
    dqkv, *others = reference_gradients(
        lambda x, mask, bias: _reference_output(*x.unbind(2), mask, options._replace(key_bias=bias)),
        (qkv, options.mask, key_bias), (do,), (True, needs_dmask, needs_key_bias),
    )  # fmt: skip
    return dqkv, *(grad.to(lse.dtype) for grad in others)


def _reference_packed_backward(do, qkv, o, lse, scale, sum_dtype, needs_dmask=False, *options):
    options = Options(scale, False, *options)
    dqkv, dmask = reference_gradients(
        lambda x, mask: _reference_output(*x.unbind(2), mask, options), (qkv, options.mask), (do,), (True, needs_dmask)
    )
    dqkv_sum = lse.new_empty(0) if sum_dtype is None else dqkv.sum((0, 1), dtype=lse.dtype).to(sum_dtype)
    return dqkv, dqkv_sum, dmask.to(lse.dtype)


def _reference_prepared_backward(
    do, qkv, q, k, o, lse, scale, mask, seed, is_causal, dropout_p, needs_dmask, needed,
    q_weight, q_bias, q_norm, q_eps, k_weight, k_bias, k_norm, k_eps, cos, sin, interleaved, prefix,
):  # fmt: skip
    options = Options(scale, False, mask, seed, is_causal, dropout_p)

    def function(qkv, mask, q_weight, q_bias, k_weight, k_bias):
        prepared = []
        for i, w, b, norm, eps in ((0, q_weight, q_bias, q_norm, q_eps), (1, k_weight, k_bias, k_norm, k_eps)):
            x = qkv[:, :, i].transpose(1, 2)
            x = reference.qk_norm(x, w, b, eps, norm) if norm else x
            x = x if cos is None else reference.rope(x, cos, sin, interleaved, prefix)
            prepared.append(x.transpose(1, 2))
        return _reference_output(*prepared, qkv[:, :, 2], mask, options)

    dqkv, dmask, *sums = reference_gradients(
        function, (qkv, mask, q_weight, q_bias, k_weight, k_bias), (do,), (True, needs_dmask, *needed)
    )
    return dqkv, *(s.to(lse.dtype) for s in sums), dmask.to(lse.dtype)


attention_fwd = register(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, float scale, {_SEPARATE_OPTIONS}, {_KEY_BIAS}) -> (Tensor, Tensor)",
    launcher=_forward,
    reference=_reference_forward,
    fake=_outputs,
    work="attention",
)
attention_bwd = register(
    "attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float scale, bool[] needed, "
    f"{_SEPARATE_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    launcher=_separate_backward,
    reference=_reference_backward,
    fake=_gradients,
)
attention_qkvpacked_fwd = register(
    f"attention_qkvpacked_fwd(Tensor qkv, float scale, {_OPTIONS}, {_KEY_BIAS}) -> (Tensor, Tensor)",
    launcher=_packed_forward,
    reference=lambda qkv, scale, *options: _reference_forward(*qkv.unbind(2), scale, False, *options),
    fake=lambda qkv, scale, *options: _outputs(*qkv.unbind(2), scale, False, *options),
    work="attention",
)
attention_qkvpacked_bwd = register(
    "attention_qkvpacked_bwd(Tensor do, Tensor qkv, Tensor o, Tensor lse, float scale, ScalarType? sum_dtype, "
    f"bool needs_dmask=False, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    launcher=_packed_backward,
    reference=_reference_packed_backward,
    fake=_packed_gradients,
)
attention_prepared_bwd = register(
    "attention_prepared_bwd(Tensor do, Tensor qkv, Tensor q, Tensor k, Tensor o, Tensor lse, float scale, "
    f"Tensor? mask, Tensor? seed, bool is_causal, float dropout_p, bool needs_dmask, bool[] needed, {_PREPARED}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    launcher=_prepared_backward,
    reference=_reference_prepared_backward,
    fake=_fake_prepared_backward,
)
attention_biased_bwd = register(
    "attention_biased_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor key_bias, float scale, "
    f"bool[] needed, {_SEPARATE_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    launcher=_biased_backward,
    reference=_reference_biased_backward,
    fake=_biased_gradients,
)
attention_qkvpacked_biased_bwd = register(
    "attention_qkvpacked_biased_bwd(Tensor do, Tensor qkv, Tensor o, Tensor lse, Tensor key_bias, float scale, "
    f"bool needs_dmask, bool needs_dkey_bias, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    launcher=_packed_biased_backward,
    reference=_reference_packed_biased_backward,
    fake=_packed_biased_gradients,
)
