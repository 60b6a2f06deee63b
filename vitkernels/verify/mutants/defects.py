"""The seeded defects: slips that a person makes in a kernel, each where the checks of ``verify`` must show it."""

from __future__ import annotations

from vitkernels.verify.mutants.seeding import Mutant
from vitkernels.verify.problems import BLOCKS, GATED, GATED_APART, ROW, WINDOW

_NORM_FORWARD = "ops.layer_norm.forward:_layer_norm_fwd_kernel"
_NORM_BACKWARD = "ops.layer_norm.backward:_layer_norm_bwd_kernel"
_PRODUCT = "ops._product:_product_kernel"
_PRODUCT_DACT = "ops._product:_product_dact_kernel"
_FORWARD = "ops.attention.forward"
_WINDOWS_BACKWARD = "ops.attention.backward_row:_attention_bwd_windows_kernel"
_ROW_BACKWARD = "ops.attention.backward_row:_attention_bwd_row_kernel"
_BLOCKS_BACKWARD = "ops.attention.backward_blocks"
_PREPARE = "ops.attention.prepare"
_HALVES, _NEIGHBOURS = "RoPE of halves, QK-norm", "RoPE of neighbours, QK-norm"
_NORMED_GATE = "separate weights, norm"

# Of the project's tests, for each the smallest that can show it.
_NORM = "ops/test_layer_norm.py::test_layer_norm[(3, 1, 72)-torch.float32]"
_NORM_OF_MANY_ROWS = "ops/test_layer_norm.py::test_layer_norm[(257, 100)-torch.float32]"
_ADD_NORM = "ops/test_layer_norm.py::test_add_layer_norm[(4, 1, 72)-gamma-path-torch.float32]"
_EPS = "ops/test_layer_norm.py::test_eps_beside_a_small_variance"
_RMS = "ops/test_rms_norm.py::test_rms_norm[(3, 1, 72)-torch.float32]"
_MEMORY = "verify/test_memory_of_ops.py"
_LINEAR = "ops/test_linear.py::test_epilogues[{}-torch.float32]"
_PLAIN, _SCALED, _SCALED_GELU = (_LINEAR.format(x) for x in ("bare-None", "residual-gamma-None", "residual-gamma-gelu"))
_MLP = "ops/test_mlp.py::test_activations[bare-{}-torch.float32]"
_GATE = "ops/test_swiglu.py::test_forms[fused-bare-{}-torch.float32]"
_ATTEND = "ops/test_attention.py::test_attention[50-20-torch.float32]"
_ROWS = "ops/test_attention.py::test_cross_lengths[65-130-torch.float32]"
_LAYOUTS = "ops/test_attention.py::test_layouts_of_inputs_and_upstream"
_MASKS = "ops/test_attention_masks.py::test_"
_BIAS = f"{_MASKS}added_masks_and_their_gradients"
_DROPOUT = f"{_MASKS}dropout_is_that_of_its_seed[windows-0.5]"
_VARLEN = "ops/test_attention_varlen.py::test_"
_IMAGES = f"{_VARLEN}images_do_not_see_each_other[24-torch.float32]"
_ROPE = "ops/test_attention_prepare.py::test_rope[5-all-{}]"
_QK_NORM = "ops/test_attention_prepare.py::test_qk_norm[{}-True-torch.float32]"
_EMBED = "ops/test_patch_embed.py::test_patch_embed"
_NORMALIZE = "ops/test_patch_embed.py::test_normalize[(8, 8)-uint8-torch.float32]"
_BLOCK_TEST = "ops/test_block.py::test_block[(8, 1, 48, 40)-layer-scale-torch.float32]"

# A name, the function, the edit, the op that shows it, the tests.
# fmt: off
_NORMS = (
    Mutant("layer_norm: eps ten times too large", _NORM_FORWARD, "square / width + eps", "square / width + 10 * eps",
           "layer_norm", _EPS, "variance near eps"),
    Mutant("layer_norm: eps added to the deviation", _NORM_FORWARD,
           "tl.sqrt(square / width + eps)", "(tl.sqrt(square / width) + eps)",
           "layer_norm", _EPS, "variance near eps"),
    Mutant("layer_norm: sum divided by the padded width", _NORM_FORWARD, "mean = total / width",
           "mean = total / BLOCK_C", "layer_norm", _NORM),
    Mutant("layer_norm: variance of a sample for that of the population", _NORM_FORWARD,
           "square / width + eps", "square / (width - 1) + eps", "layer_norm", _NORM),
    Mutant("layer_norm: mean taken in half precision", _NORM_FORWARD, "total = tl.sum(r, axis=1)",
           "total = tl.sum(r.to(tl.float16), axis=1).to(ACC)", "layer_norm", _NORM),
    Mutant("layer_norm: upstream gradient taken to be dense", "ops.layer_norm.backward:layer_norm_backward",
           "stride_dy_row=dy_rows.stride(0)", "stride_dy_row=C",
           "layer_norm", "ops/test_layer_norm.py::test_layouts_of_inputs_and_upstream", by="layouts"),
    Mutant("linear: residual taken to be dense", "ops._product:product",
           "0 if residual is None else residual.stride(0)", "0 if residual is None else N",
           "linear", "ops/test_linear.py::test_layouts_of_inputs_and_upstream", "residual", by="layouts"),
    Mutant("layer_norm: lanes beyond the row hold minus the mean", "ops.layer_norm.forward:_centre",
           "tl.where(mask, r - mean[:, None], 0.0)", "r - mean[:, None]", "layer_norm", _NORM),
    Mutant("layer_norm: bias read from the weight", _NORM_FORWARD, "tl.load(bias_ptr", "tl.load(weight_ptr",
           "layer_norm", _NORM),
    Mutant("rms_norm: the mean subtracted as in LayerNorm", _NORM_FORWARD, "mean = tl.zeros((BLOCK_M,), ACC)",
           "mean = tl.sum(r, axis=1) / width", "rms_norm", _RMS),
    Mutant("add_layer_norm: DropPath left out of the sum", "ops.layer_norm.forward:_load_sum", "x *= path[:, None]",
           "x *= 1.0", "add_layer_norm", _ADD_NORM, "scaled"),
    Mutant("add_layer_norm: rows of a sample counted one too many", "ops.layer_norm.forward:layer_norm_forward",
           "M // x.shape[0]", "M // x.shape[0] + 1", "add_layer_norm", _ADD_NORM, "scaled"),
    Mutant("layer_norm backward: mean of the gradient not subtracted", _NORM_BACKWARD,
           "g - g_mean[:, None] - x_hat * gx_mean[:, None]", "g - x_hat * gx_mean[:, None]",
           "layer_norm", _NORM),
    Mutant("layer_norm backward: projection divided by the padded width", _NORM_BACKWARD,
           "gx_mean = tl.sum(g * x_hat, axis=1) / width", "gx_mean = tl.sum(g * x_hat, axis=1) / BLOCK_C",
           "layer_norm", _NORM),
    Mutant("layer_norm backward: weight gradient from the input as it came", _NORM_BACKWARD,
           "_tile.sum_rows(dy * x_hat)", "_tile.sum_rows(dy * r)", "layer_norm", _NORM),
    Mutant("add_layer_norm backward: gradient of the residual stream dropped", _NORM_BACKWARD,
           "dr += upstream", "dr += 0.0 * upstream", "add_layer_norm", _ADD_NORM),
    Mutant("add_layer_norm backward: DropPath missing", _NORM_BACKWARD, "dr *= path[:, None]", "dr *= 1.0",
           "add_layer_norm", _ADD_NORM, "scaled"),
    Mutant("add_layer_norm backward: LayerScale missing", _NORM_BACKWARD, "dx = dr * gamma[None, :]", "dx = dr",
           "add_layer_norm", _ADD_NORM, "scaled"),
    Mutant("add_layer_norm backward: gradient of LayerScale without the branch", _NORM_BACKWARD,
           "tl.where(mask, dr * x, 0.0)", "tl.where(mask, dr, 0.0)",
           "add_layer_norm", _ADD_NORM, "scaled"),
    Mutant("layer_norm backward: all programs write one row of weight gradients", _NORM_BACKWARD,
           "dweight_ptr + pid * C + offs_c", "dweight_ptr + offs_c", "layer_norm", _NORM_OF_MANY_ROWS, case=ROW),
    Mutant("layer_norm: one statistic written beyond its buffer", _NORM_FORWARD,
           "tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)", "tl.store(rstd_ptr + offs_m, rstd, mask=offs_m <= M)",
           "layer_norm", _MEMORY, by="memory"),
    Mutant("layer_norm backward: NaN left out of the weight gradient", _NORM_BACKWARD, "_tile.sum_rows(dy * x_hat)",
           "_tile.sum_rows(tl.where(tl.abs(x_hat) < 1e30, dy * x_hat, 0.0))",
           "layer_norm", "ops/test_layer_norm.py::test_a_bad_row_reaches_the_gradients_of_the_parameters",
           by="nonfinite"),
)

_PRODUCTS = (
    Mutant("linear: bias of the first tile for every tile", _PRODUCT, "bias_ptr + first_n + offs_n",
           "bias_ptr + offs_n", "linear", "ops/test_linear.py::test_shapes", "", ROW),
    Mutant("linear: LayerScale before the activation", _PRODUCT, "y = _tile.activate(z, ACTIVATION)",
           "y = _tile.activate(z * tl.load(gamma_ptr + first_n + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]"
           " if HAS_GAMMA else z, ACTIVATION)", "linear", _SCALED_GELU, "gelu", WINDOW),
    Mutant("linear: LayerScale forgotten", _PRODUCT, "if HAS_GAMMA:", "if HAS_GAMMA and not HAS_RESIDUAL:",
           "linear", _SCALED, "residual", WINDOW),
    Mutant("linear: one column of the operands too many", "ops._product:_accumulate",
           "mask_k = offs_k < K - start", "mask_k = offs_k <= K - start", "linear", _PLAIN),
    Mutant("linear: tail of the summed dim masked in one operand alone", "ops._product:_accumulate",
           "a = tl.load(a_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)",
           "a = tl.load(a_ptrs, mask=mask_m[:, None], other=0.0)", "linear", _MEMORY, by="memory"),
    Mutant("products: operands rounded to half precision", "ops._tile:dot", "tl.dot(a, b, acc",
           "tl.dot(a.to(tl.float16), b.to(tl.float16), acc", "linear", _PLAIN),
    Mutant("products: accumulated in half precision", "ops._product:_accumulate",
           "acc = _tile.dot(a, b, acc, PRECISION)", "acc = _tile.dot(a, b, acc, PRECISION).to(tl.float16).to(ACC)",
           "linear", _PLAIN),
    Mutant("linear backward: power of two of a folded LayerScale forgotten", _PRODUCT, "if HAS_ALPHA:",
           "if HAS_ALPHA and HAS_BIAS:", "linear", "ops/test_linear.py::test_layer_scale_of_1e_5_survives_fp16",
           "residual", WINDOW, dtype="fp16"),
    Mutant("linear backward: no bias gradient", "ops.linear:weight_gradients",
           "dy.sum(0, dtype=sums_dtype) if sums", "dy.new_zeros(dy.shape[1], dtype=sums_dtype) if sums",
           "linear", _PLAIN),
    Mutant("linear backward: bias gradient short of a row", "ops.linear:weight_gradients",
           "dy.sum(0, dtype=sums_dtype) if sums", "dy[1:].sum(0, dtype=sums_dtype) if sums",
           "linear", _PLAIN),
    Mutant("linear backward: LayerScale missing in the input gradient", "ops.linear:linear_backward",
           "fold_layer_scale(weight, gamma)", "fold_layer_scale(weight, None)",
           "linear", _SCALED, "residual", WINDOW),
    Mutant("linear backward: gradient of LayerScale without the bias", "ops.linear:weight_gradients",
           "dgamma + bias.to(sums_dtype) * dbias", "dgamma", "linear", _SCALED, "residual", WINDOW),
    Mutant("linear backward: LayerScale folded into the weight itself", "ops.linear:fold_layer_scale",
           "weight.to(gamma.dtype) * gamma.unsqueeze(1)", "weight.to(gamma.dtype).mul_(gamma.unsqueeze(1))",
           "linear", _SCALED, "residual", WINDOW, by="memory"),
    Mutant("linear backward: LayerScale missing behind an activation", "ops.linear:_activation_bwd_kernel",
           "dy * gamma[None, :] * _tile", "dy * _tile", "linear", _SCALED_GELU, "gelu", WINDOW),
    Mutant("linear backward: weight gradient summed in any order", "ops.linear:weight_gradients",
           "product(dy.t(), x, out", "(lambda rows, **how: (sum(product(dy[i].t(), x[i], **how)[0] for i in "
           "(slice(rows), slice(rows, None))), None))(1 + torch.Generator().seed() % (len(x) - 1), out",
           "linear", "ops/test_linear.py::test_reruns_are_bit_equal", by="reruns"),
    Mutant("GELU: tanh for erf", "ops._tile:activate", "z * _normal_cdf(z)",
           "z * _sigmoid((z + 0.044715 * z * z * z) * 2.0 * SQRT_2_OVER_PI)", "mlp", _MLP.format("gelu")),
    Mutant("GELU: a threshold swallows NaN", "ops._tile:activate", "z * _normal_cdf(z)",
           "tl.where(z > -8.0, z * _normal_cdf(z), 0.0)", "linear",
           "ops/test_linear.py::test_a_bad_row_stays_in_its_row", "gelu", by="nonfinite"),
    Mutant("GELU: a digit of the polynomial wrong", "ops._tile:_normal_cdf", "7.1268651e-03", "7.1368651e-03",
           "mlp", "ops/test_linear.py::test_gelu_is_off_by_roundings_alone"),
    Mutant("GELU backward: the density forgotten", "ops._tile:activate_grad",
           "_normal_cdf(z) + z * INV_SQRT_2PI * tl.exp(-0.5 * z * z)", "_normal_cdf(z)", "mlp", _MLP.format("gelu")),
    Mutant("GELU by tanh, backward: a factor of three lost", "ops._tile:activate_grad", "0.134145", "0.044715",
           "mlp", _MLP.format("gelu_tanh"), case=ROW),
    Mutant("quick_gelu: 1.7 for 1.702", "ops._tile:activate", "_sigmoid(z * QUICK)", "_sigmoid(z * 1.7)",
           "linear", _LINEAR.format("bare-quick_gelu"), "quick_gelu"),
    Mutant("SiLU backward: its slope forgotten", "ops._tile:activate_grad",
           "_sigmoids(z)\n        return s + z * s * t", "_sigmoids(z)\n        return s",
           "swiglu_mlp", _MLP.format("silu")),
    Mutant("mlp backward: what is computed again is not activated", _PRODUCT_DACT,
           "_tile.cast(_tile.activate(z, ACTIVATION), ", "_tile.cast(z, ", "mlp", _MLP.format("gelu"), "recompute"),
)

_SWIGLU = (
    Mutant("swiglu: gate and value swapped", "ops.swiglu.forward:_glu_product_kernel",
           "_tile.activate(g, ACTIVATION) * v", "_tile.activate(v, ACTIVATION) * g",
           "swiglu_mlp", _GATE.format("packed-")),
    Mutant("swiglu: weights taken to have unit stride", "ops.swiglu.forward:glu_forward",
           "within_reach(unit_stride(w)) for w", "within_reach(w) for w",
           "swiglu_mlp", "ops/test_swiglu.py::test_layouts_of_inputs_and_upstream", by="layouts"),
    Mutant("swiglu: norm divided by the padded width", _NORM_FORWARD, "mean = total / width", "mean = total / C",
           "swiglu_mlp", _GATE.format("separate-norm"), _NORMED_GATE),
    Mutant("swiglu backward: gradient of the gate without the value", "ops.swiglu.backward:_gate_gradients",
           "dgate = dh * value * ", "dgate = dh * ", "swiglu_mlp", _GATE.format("packed-")),
    Mutant("swiglu backward: gradient of the value with the gate not activated", "ops.swiglu.backward:_gate_gradients",
           "dvalue = dh * act", "dvalue = dh * gate", "swiglu_mlp", _GATE.format("packed-")),
    Mutant("swiglu backward: bias gradient of the gate for that of the value",
           "ops.swiglu.backward:_glu_product_bwd_kernel",
           "sums_ptrs + (1 - GATE) * P, _tile.sum_rows(dvalue)", "sums_ptrs + (1 - GATE) * P, _tile.sum_rows(dgate)",
           "swiglu_mlp", _GATE.format("packed-"), case=GATED),
    Mutant("swiglu backward: bias gradient of the value without the gate", "ops.swiglu.backward:_glu_bwd_kernel",
           "value_sum += _tile.sum_rows(dvalue)", "value_sum += _tile.sum_rows(dh)",
           "swiglu_mlp", _GATE.format("separate-norm"), _NORMED_GATE),
    Mutant("swiglu backward: separate weights put together without the padding", "ops.swiglu:_joined",
           "[first, padding, second, padding]", "[first, second, padding, padding]",
           "swiglu_mlp", _GATE.format("separate-"), case=GATED_APART),
)

_ATTENTION = (
    Mutant("attention: scale off by 0.1 %", "ops.attention.operands:Options.arguments", "self.scale * LOG2_E",
           "self.scale * LOG2_E * 1.001", "attention", _ATTEND, ""),
    Mutant("attention by windows: last key dropped", f"{_FORWARD}:_attention_fwd_windows_kernel",
           "mask_n = n < N_kv", "mask_n = n < N_kv - 1", "attention", _ATTEND, ""),
    Mutant("attention by windows: a guard against -inf swallows NaN", f"{_FORWARD}:_attention_fwd_windows_kernel",
           "p = exp_scores(s - shift[:, None], MASK)",
           "p = tl.where(s > float('-inf'), exp_scores(s - shift[:, None], MASK), 0.0)",
           "attention", f"{_MASKS}a_nan_in_one_image_stays_there", "learned bias", by="nonfinite"),
    Mutant("attention: channels taken to have unit stride", f"{_FORWARD}:attention_forward",
           "q, k, v = (runtime.unit_stride(t) for t in (q, k, v))", "q, k, v = q, k, v",
           "attention", f"{_LAYOUTS}[last dim strided]", "", by="layouts"),
    Mutant("attention by rows: padding keys count", f"{_FORWARD}:_attention_fwd_row_kernel",
           "i < len(PIECES) - 1,", "True,", "attention", _ROWS, "", ROW),
    Mutant("attention by rows: grid one program short", f"{_FORWARD}:attention_forward",
           "_attention_fwd_row_kernel[(B * H * num_blocks,)]", "_attention_fwd_row_kernel[(B * H * num_blocks - 1,)]",
           "attention", _ROWS, "", ROW, by="memory"),
    Mutant("attention by blocks: sum not rescaled to the new maximum", f"{_FORWARD}:_attend",
           "scaled_head(o, rescale[:, None])", "o", "attention",
           "ops/test_attention.py::test_attention[257-36-torch.float32]", "", BLOCKS),
    Mutant("attention by blocks: natural logarithm in a base-2 log-sum-exp", f"{_FORWARD}:_store_output",
           "m + tl.log2(total)", "m + tl.log(total)", "attention_varlen", _IMAGES),
    Mutant("attention: a row that sees no key is not 0", f"{_FORWARD}:_store_output",
           'if MASK != "" or VARLEN:', "if False:",
           "attention", f"{_MASKS}a_query_that_looks_at_no_key[windows-bool]", "pair mask"),
    Mutant("attention: biased scores not brought to base 2", "ops.attention.tiles:exp_scores", "x * LOG2_E", "x",
           "attention", f"{_BIAS}[windows-pairs of each head]", "learned bias"),
    Mutant("attention: causal queries stop a block of keys too early", f"{_FORWARD}:_attention_fwd_blocks_kernel",
           "visible = tl.minimum(end, pid_m * BLOCK_M + BLOCK_M)", "visible = tl.minimum(end, pid_m * BLOCK_M)",
           "attention", f"{_MASKS}causal[blocks-False]", "causal", case=BLOCKS),
    Mutant("attention backward: causal keys start a block of queries too late",
           f"{_BLOCKS_BACKWARD}:_attention_bwd_dkv_kernel", "from_query = pid_n * BLOCK_N // BLOCK_M * BLOCK_M",
           "from_query = pid_n * BLOCK_N // BLOCK_M * BLOCK_M + BLOCK_M",
           "attention", f"{_MASKS}causal[blocks-False]", "causal", case=BLOCKS),
    Mutant("attention: causal mask off by one", "ops.attention.tiles:masked", "m >= n", "m + 1 >= n",
           "attention", f"{_MASKS}causal[windows-False]", "causal"),
    Mutant("attention: key mask ignored for the last key", "ops.attention.tiles:load_mask",
           "tl.load(ptrs, mask=n < mask_width, other=0)", "tl.load(ptrs, mask=n < mask_width - 1, other=0)",
           "attention", f"{_MASKS}bool_masks[windows-keys of each image]", "key mask"),
    Mutant("attention: what dropout keeps is not scaled", "ops.attention.tiles:dropout_scale",
           "2147483648.0 / (2147483648 - DROPOUT)", "1.0", "attention", _DROPOUT, "dropout"),
    Mutant("attention: one dropout mask for all heads", "ops.attention.tiles:dropout_scale",
           "zero + bh.to(tl.int32)", "zero", "attention", _DROPOUT, "dropout"),
    Mutant("attention backward: dropout drawn by another seed", _WINDOWS_BACKWARD, "tl.load(seed_ptr)",
           "tl.load(seed_ptr) + 1", "attention", _DROPOUT, "dropout"),
    Mutant("attention: dropout drawn by the clock", "ops.attention:_seed",
           "torch.randint(2**62, (1,), device=x.device)",
           "torch.tensor([torch.Generator().seed() >> 2], device=x.device)",
           "attention", f"{_MASKS}dropout_is_repeated_by_manual_seed_alone", "dropout", by="reruns"),
    Mutant("attention_varlen: last token of each image lost", "ops.attention.tiles:image_of",
           "tl.load(starts_ptr + image + 1)", "tl.load(starts_ptr + image + 1) - 1",
           "attention_varlen", _IMAGES),
    Mutant("attention_varlen: tokens of no image left unwritten", f"{_FORWARD}:forward_outputs",
           "torch.zeros", "torch.empty", "attention_varlen", f"{_VARLEN}tokens_of_no_image_are_zero", by="memory"),
    Mutant("attention_varlen backward: gradients of tokens of no image not zeroed", "ops.attention:_gradients",
           "torch.zeros", "torch.empty", "attention_varlen", f"{_VARLEN}tokens_of_no_image_are_zero", by="memory"),
    Mutant("attention backward by windows: delta missing", _WINDOWS_BACKWARD, "p * (dp - delta[None, :])", "p * dp",
           "attention", _ATTEND, ""),
    Mutant("attention backward by windows: bias gradient of the first windows alone",
           "ops.attention.backward:_launch_windows", "dmask.sum(0 if", "dmask[:1].sum(0 if",
           "attention", f"{_BIAS}[windows-pairs of a head]", "learned bias"),
    Mutant("attention backward by windows: bias gradient of the values for that of the keys", _WINDOWS_BACKWARD,
           "_store_column_sums(sums + H * D, dk_sums", "_store_column_sums(sums + H * D, dv_sums",
           "block", "ops/test_block.py::test_block[(2, 50, 60, 132)-plain-torch.float32]"),
    Mutant("attention backward by windows: a guard against -inf swallows NaN",
           "ops.attention.backward_row:_softmax_columns",
           "total = _tile.sum_rows(p)", "p = tl.where(s > float('-inf'), p, 0.0)\n    total = _tile.sum_rows(p)",
           "attention", "ops/test_attention.py::test_a_nan_reaches_the_gradients_of_its_head_alone", "",
           by="nonfinite"),
    Mutant("attention backward: upstream gradient taken to lie as the output does",
           "ops.attention.backward:attention_backward", 'strides("do", do)', 'strides("do", o)',
           "attention", f"{_LAYOUTS}[expanded tokens]", "", by="layouts"),
    Mutant("attention backward by rows: last key dropped", _ROW_BACKWARD, "mask_n = offs_n < N_kv",
           "mask_n = offs_n < N_kv - 1", "attention", _ROWS, "", ROW),
    Mutant("attention backward by rows: gradient of the values from the last queries alone", _ROW_BACKWARD,
           "dv = gather(p, do, dv, PRECISION)", "dv = gather(p, do, zero_head(BLOCK_N, PARTS, ACC), PRECISION)",
           "attention", _ROWS, "", ROW),
    Mutant("attention backward by blocks: gradient of the queries off by 0.1 %",
           f"{_BLOCKS_BACKWARD}:_attention_bwd_dq_kernel", "scaled_head(dq, scale)", "scaled_head(dq, scale * 1.001)",
           "attention_varlen", _IMAGES),
    Mutant("attention backward by blocks: delta missing in the gradient of the keys",
           f"{_BLOCKS_BACKWARD}:_attention_bwd_dkv_kernel", "p * (dp - delta[None, :])", "p * dp",
           "attention_varlen", _IMAGES),
    Mutant("attention backward by blocks: delta missing in the bias gradient",
           f"{_BLOCKS_BACKWARD}:_attention_bwd_dmask_kernel", "p * (dp - delta[:, None])", "p * dp",
           "attention", f"{_BIAS}[blocks-pairs of each head]", "learned bias", BLOCKS),
    Mutant("attention backward by blocks: a minimum that drops NaN", "ops.attention.tiles:weights_of",
           "tl.minimum(s - lse, 0.0, propagate_nan=tl.PropagateNan.ALL)", "tl.where(s < lse, s - lse, 0.0)",
           "attention_varlen", f"{_VARLEN}a_nan_stays_in_its_image", by="nonfinite"),
    Mutant("RoPE: turned the other way", f"{_PREPARE}:_prepare_fwd_kernel", "-partner, partner)", "partner, -partner)",
           "attention", _ROPE.format("False"), _HALVES),
    Mutant("RoPE: positions counted from the class token", f"{_PREPARE}:_prepare_fwd_kernel",
           "(n - prefix).to(tl.int64)", "(n % (N - prefix)).to(tl.int64)",
           "attention", _ROPE.format("False"), _HALVES),
    Mutant("RoPE: prefix tokens multiplied by 0", f"{_PREPARE}:_prepare_fwd_kernel",
           "tl.load(cos_ptr + rows, mask=turned, other=1.0)", "tl.load(cos_ptr + rows, mask=turned, other=0.0)",
           "attention", _ROPE.format("False"), _HALVES),
    Mutant("RoPE backward: turned the same way as forward", f"{_PREPARE}:_prepare_bwd_kernel",
           "_swap_pairs(g * sin, 1.0, -1.0", "_swap_pairs(g * sin, -1.0, 1.0",
           "attention", _ROPE.format("True"), _NEIGHBOURS),
    Mutant("QK-norm: eps of 1e-5 whatever was asked for", f"{_PREPARE}:_statistics", "/ D + eps", "/ D + 1e-5",
           "attention", _QK_NORM.format("50-64"), _HALVES),
    Mutant("QK-norm backward: projection divided by the padded width", f"{_PREPARE}:_prepare_bwd_kernel",
           "(tl.sum(g * x_hat, axis=1)[:, None] / D)", "(tl.sum(g * x_hat, axis=1)[:, None] / BLOCK_D)",
           "attention", _QK_NORM.format("70-72"), _HALVES),
    Mutant("QK-norm backward: weight gradient of the last head alone", f"{_PREPARE}:_prepare_bwd_kernel",
           "dweight += g * x_hat", "dweight = g * x_hat", "attention", _QK_NORM.format("50-64"), _HALVES),
)

_EMBEDDING = (
    Mutant("patch_embed: patches counted by columns", "ops.patch_embed.pixels:patch_offsets",
           "row * PY * stride_y + column * PX * stride_x", "column * PY * stride_y + row * PX * stride_x",
           "patch_embed", _EMBED),
    Mutant("patch_embed: positions of prefix tokens added twice", "ops.patch_embed.forward:_patch_embed_fwd_kernel",
           "prefix += _load_rows(", "prefix += 2 * _load_rows(", "patch_embed", _EMBED),
    Mutant("patch_embed: last pixel of each patch lost", "ops.patch_embed.forward:_patch_embed_fwd_kernel",
           "mask_k = offs_k < K", "mask_k = offs_k < K - 1", "patch_embed", _EMBED),
    Mutant("patch_embed: deviation of the first channel for all", "ops.patch_embed.pixels:scale_and_shift",
           "1.0 / (one * s) for s in std", "1.0 / (one * std[0]) for s in std",
           "patch_embed", _NORMALIZE, "uint8"),
    Mutant("patch_embed backward: pixels not normalised for the weight gradient",
           "ops.patch_embed.backward:_patch_embed_bwd_weight_kernel", "pixels.to(ACC) * scale + shift",
           "pixels.to(ACC) * scale", "patch_embed", _NORMALIZE, "uint8"),
    Mutant("patch_embed backward: weight gradient of the last channel unwritten",
           "ops.patch_embed.backward:_patch_embed_bwd_weight_kernel", "mask_c = offs_c < C", "mask_c = offs_c < C - 1",
           "patch_embed", _EMBED, by="memory"),
    Mutant("patch_embed backward: prefix tokens counted in the bias gradient",
           "ops.patch_embed:PatchEmbedFunction.backward", "dbias = dout[R:].sum(0)", "dbias = dout.sum(0)",
           "patch_embed", _EMBED),
    Mutant("patch_embed backward: image gradient from the tokens before",
           "ops.patch_embed.backward:_patch_embed_bwd_images_kernel", "(R + n) * stride_dout_t", "n * stride_dout_t",
           "patch_embed", _EMBED),
    Mutant("patch_embed backward: upstream gradient taken to be dense", "ops.patch_embed.backward:_launch_bwd_weight",
           "stride_dout_c=dout.stride(2)", "stride_dout_c=1",
           "patch_embed", "ops/test_patch_embed.py::test_layouts_of_the_upstream_gradient", by="layouts"),
)

_BLOCK = (
    Mutant("block: LayerScale of the attention forgotten", "ops.block:_forward", "proj_w, proj_b, gamma1, None",
           "proj_w, proj_b, None, None", "block", _BLOCK_TEST),
    Mutant("block: the stale input for the residual of the MLP", "ops.block:_forward", "b2, gamma2, r, activation",
           "b2, gamma2, x, activation", "block", _BLOCK_TEST),
    Mutant("block backward: gradient through the first residual dropped", "ops.block:BlockFunction.backward",
           "dh1, dr, x, None", "dh1, None, x, None", "block", _BLOCK_TEST),
    Mutant("block backward: bias gradients of the two branches swapped", "ops.block:BlockFunction.backward",
           "_, dy_sum, dr_sum = ", "_, dr_sum, dy_sum = ", "block", _BLOCK_TEST),
    Mutant("block backward: gradient of LayerScale without the bias", "ops.block:_bias_and_gamma",
           "d_gamma = d_gamma + bias.to(upstream_sum.dtype) * upstream_sum", "d_gamma = d_gamma",
           "block", _BLOCK_TEST),
)
# fmt: on

MUTANTS: tuple[Mutant, ...] = _NORMS + _PRODUCTS + _SWIGLU + _ATTENTION + _EMBEDDING + _BLOCK
