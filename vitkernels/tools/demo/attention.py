"""A Vision Transformer's attention and position embeddings, computed in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkernels import runtime


@torch.no_grad()
def class_token_attention(model: nn.Module, images: Tensor) -> Tensor:
    """Return how much the class token attends to each patch in the last block: (B, H, rows, columns), on the CPU.

    The softmax of each head sums to 1 over all tokens; the result has only the patches' part, without prefix tokens.

    Args:
        model: A :class:`vitkernels.models.VisionTransformer`, or timm's with timm's Block and Attention, accelerated
            or not. It must have a class token.
        images: The model's input, (B, I, Y, X).
    """
    block, tokens = model.blocks[-1], []
    # A hook inside the block would keep it from running fused: hook the block itself.
    hook = block.register_forward_pre_hook(lambda module, args: tokens.append(args[0]))
    try:
        with runtime.use_backend("torch"):
            model(images)
            attn, x = block.attn, block.norm1(tokens[0])
    finally:
        hook.remove()
    B, N, _ = x.shape
    qkv = F.linear(x, attn.qkv.weight, attn.qkv.bias).view(B, N, 3, attn.num_heads, -1)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    if hasattr(attn, "q_norm"):  # timm's
        q, k = attn.q_norm(q), attn.k_norm(k)
    weights = (attn.scale * q[:, :, :1] @ k.transpose(-2, -1)).softmax(-1)
    rows, columns = (size // patch for size, patch in zip(images.shape[2:], model.patch_embed.patch_size, strict=True))
    return weights[:, :, 0, -rows * columns :].unflatten(-1, (rows, columns)).cpu()


@torch.no_grad()
def position_similarity(model: nn.Module) -> Tensor | None:
    """Return the cosine similarity of every two patches' position embeddings, as in figure 7 of arXiv 2010.11929.

    The shape is (rows, columns, rows, columns), on the CPU. Return None if the model has no position embedding.
    """
    if model.pos_embed is None:
        return None
    rows, columns = model.patch_embed.grid_size
    patches = F.normalize(model.pos_embed[0, -rows * columns :].float(), dim=-1)
    return (patches @ patches.T).view(rows, columns, rows, columns).cpu()
