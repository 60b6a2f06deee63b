"""Pre-train a Vision Transformer without labels: it sees a quarter of the patches and rebuilds the others.

    python examples/mae.py --data photos --out run --model vit_base_patch16_224
    torchrun --nproc-per-node 8 examples/mae.py --data photos --out run --model vit_base_patch16_224
    python examples/finetune.py --model run --data pets/train --val pets/val --out tuned

This is the masked autoencoder of arXiv 2111.06377. The encoder is ``vitkernels.models.VisionTransformer``, whose patch
embedding computes the visible patches alone, so its rows are short in every block. With two shares as --mask-ratio,
each image hides a share between them, and the blocks see the visible patches of all images packed into one row, without
padding. A light decoder gets a mask token for each hidden patch, and predicts its pixels, less the patch's mean and
over its deviation. Positions are fixed sines. AdamW has β = 0.9, 0.95; the learning rate is for 256 images a step, and
grows with --batch-size.

The result is the encoder: model.safetensors, with the config.json by which timm and finetune.py load it. The labels
that the data may have are not read. What happens when the run is killed: see examples/common.py; when an image does not
decode: examples/image_data.py.
"""

from __future__ import annotations

import argparse
import contextlib
import math

import common
import image_data
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import KeyValues, Processes, number, positive
from torch import Tensor, nn

import vitkernels
from vitkernels.layers import Block, LayerNorm, Linear, random_mask, sincos2d
from vitkernels.models import VisionTransformer
from vitkernels.tools.console import UserError, import_timm, one_line
from vitkernels.tools.names import build, resolve


class Masked:
    """Augments an image, and draws which of its ``patches`` are hidden: the share ``mask_ratio``, as in MAE.

    Of two shares, one between them is drawn for each image, and ``num_visible`` says how many patches that leaves.
    ``visible`` names as many for each image as the lower share leaves, so that they make a batch: first the visible
    ones, in the image's order.
    """

    def __init__(self, transform, patches: int, mask_ratio: list[float]):
        self.transform, self.patches, self.mask_ratio = transform, patches, mask_ratio
        self.most = random_mask(1, patches, mask_ratio[0]).visible.shape[1]

    def __call__(self, image) -> dict[str, Tensor]:
        found = {"images": self.transform(image)}
        # Drawn here, a mask depends on epoch and image alone, not on how many processes share a batch.
        low, high = self.mask_ratio[0], self.mask_ratio[-1]
        drawn = random_mask(1, self.patches, low + (high - low) * torch.rand(()).item())
        found |= {"mask": drawn.mask[0], "visible": drawn.mask[0].int().argsort(stable=True)[: self.most]}
        return found | ({"num_visible": torch.tensor(drawn.visible.shape[1])} if len(self.mask_ratio) == 2 else {})


class MaskedAutoencoder(nn.Module):
    """Images (B, 3, Y, X) to the loss (B,) of the hidden patches; ``blocks`` are the encoder's."""

    def __init__(self, encoder: VisionTransformer, pretrained_cfg: dict, dim: int, depth: int, num_heads: int):
        super().__init__()
        self.encoder, self.pretrained_cfg = encoder, pretrained_cfg
        prefix, grid_size = encoder.num_prefix_tokens, encoder.patch_embed.grid_size
        embed_prefix = 0 if encoder.no_embed_class else prefix
        del encoder.pos_embed
        encoder.register_buffer("pos_embed", sincos2d(grid_size, encoder.embed_dim, num_prefix_tokens=embed_prefix))
        self.embed = Linear(encoder.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sincos2d(grid_size, dim, num_prefix_tokens=prefix), persistent=False)
        self.decoder = nn.Sequential(*(Block(dim, num_heads, 4.0, qkv_bias=True) for _ in range(depth)))
        self.norm = LayerNorm(dim)
        self.pixels = Linear(dim, 3 * math.prod(encoder.patch_embed.patch_size))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                nn.init.zeros_(module.bias)
        for token in (encoder.cls_token, encoder.reg_token, self.mask_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    @property
    def blocks(self) -> nn.Module:
        """The encoder's blocks, which are recomputed, compiled and sharded one by one."""
        return self.encoder.blocks

    def targets(self, images: Tensor) -> Tensor:
        """Return the pixels (B, N, P·P·3) of each patch in fp32, with mean 0 and deviation 1."""
        rows, columns = self.encoder.patch_embed.patch_size
        patches = images.float().unflatten(3, (-1, columns)).unflatten(2, (-1, rows))  # (B, 3, n, P, m, P)
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()

    def forward(self, images: Tensor, visible: Tensor, mask: Tensor, num_visible: Tensor | None = None) -> Tensor:
        prefix = self.encoder.num_prefix_tokens
        x = self.embed(self.encoder.forward_features(images, visible=visible, num_visible=num_visible))
        shown = F.pad(~mask, (prefix, 0), value=True).unsqueeze(-1)  # (B, R + N, 1)
        tokens = self.mask_token.to(x.dtype).expand(*shown.shape[:2], -1)
        tokens = tokens.masked_scatter(shown, x)  # which the encoder returns in this order, packed or not
        x = self.decoder(tokens + self.positions)
        off = self.pixels(self.norm(x))[:, prefix:].float() - self.targets(images)
        return (off.square().mean(-1) * mask).sum(1) / mask.sum(1)


def losses_of(model: nn.Module, images: Tensor, **masks: Tensor) -> Tensor:
    """Return the loss (B,) of uint8 ``images``."""
    return model(common.normalized(images, model), **masks)


def loss_of(model: nn.Module, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Return the sum over images of the loss."""
    return losses_of(model, **batch).sum()


@torch.no_grad()
def evaluate(args: argparse.Namespace, processes: Processes, model: nn.Module, data, transform) -> None:
    """Print the mean loss on ``data``. All processes must call this."""
    total = torch.zeros((), dtype=torch.float64, device=processes.device)
    model.eval()
    for batch, _, counted in common.held_out(data, transform, args, processes):
        with common.autocast(args, processes):
            total += losses_of(model, **batch)[:counted].double().sum()
    dist.all_reduce(total)
    if processes.rank == 0:
        print(f"held out: loss {total.item() / len(data):.4f} of {len(data)} images")


def make_model(args: argparse.Namespace) -> MaskedAutoencoder:
    """Return the autoencoder with random weights."""
    torch.manual_seed(args.seed)
    options = {"num_classes": 0, "img_size": args.img_size} | args.model_kwargs
    plain, _ = build(resolve(args.model).for_timm, **options)
    try:
        encoder = VisionTransformer.from_timm(plain, features_only=True)
        if encoder.pos_embed is None:
            raise ValueError("it has no position embedding")
        return MaskedAutoencoder(
            encoder, plain.pretrained_cfg, args.decoder_dim, args.decoder_depth, args.decoder_heads
        )
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise UserError(f"there is no autoencoder of {args.model}: {one_line(error)}") from error


def mae(args: argparse.Namespace, processes: Processes) -> None:
    """Train, write the encoder, and print the loss on the held-out images if there are any.

    Raises:
        UserError: The data, the model, the output or a checkpoint stands in the way; the text says how.
    """
    common.check_options(args, processes)
    import_timm()
    data = image_data.open_data(args.data)
    val = image_data.open_data(args.val, held_out=True) if args.val else None
    autoencoder = make_model(args)
    patches = autoencoder.encoder.patch_embed.num_patches
    model = common.prepare(autoencoder, args, processes)
    groups = common.decay_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate * args.batch_size / 256, betas=(0.9, 0.95))
    steps = math.ceil(args.epochs * len(data) / args.batch_size)
    transform = image_data.train_transform(args.img_size, args.crop_scale, args.flip)
    common.train(args, processes, model, optimizer, data, steps, loss_of, Masked(transform, patches, args.mask_ratio))
    weights = common.whole_weights(model)
    if processes.rank == 0:
        own = {key.removeprefix("encoder."): value for key, value in weights.items() if key.startswith("encoder.")}
        kwargs = {"img_size": args.img_size} | args.model_kwargs
        common.export(args.out, own, autoencoder.pretrained_cfg["architecture"], 0, autoencoder, **kwargs)
    if val is not None:
        transform = image_data.eval_transform(args.img_size)
        evaluate(args, processes, model, val, Masked(transform, patches, args.mask_ratio))


def main(argv: list[str] | None = None) -> None:
    """Read the command line, train, and turn errors into one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_options(parser, img_size=224, batch_size=4096, learning_rate=1.5e-4, warm_up=12_500)
    parser.set_defaults(crop_scale=0.2)
    add = parser.add_argument
    add("--model", default="vit_base_patch16_224", help="a Vision Transformer of timm by name (%(default)s)")
    add("--model-kwargs", nargs="+", action=KeyValues, default={}, metavar="KEY=VALUE", help="changes to it")
    add(
        "--mask-ratio",
        type=number(float, 0.01, 0.99),
        nargs="+",
        default=[0.75],
        metavar="SHARE",
        help="of patches that are hidden (0.75); of two, one between them is drawn for each image",
    )
    add("--decoder-dim", type=positive, default=512, metavar="N", help="channels of the decoder (%(default)s)")
    add("--decoder-depth", type=positive, default=8, metavar="N", help="its blocks (%(default)s)")
    add("--decoder-heads", type=positive, default=16, metavar="N", help="their heads (%(default)s)")
    add("--epochs", type=number(float, 0), default=800, help="passes over the data (%(default)s)")
    add("--weight-decay", type=number(float, 0), default=0.05, help="of matrices (%(default)s)")
    args = parser.parse_args(argv)
    if len(args.mask_ratio) > 2 or args.mask_ratio != sorted(args.mask_ratio):
        parser.error(f"--mask-ratio is {args.mask_ratio}; expected one share, or a lower and a higher one")
    # The layers are vitkernels' own: there is nothing to swap, but PyTorch can compute them.
    plain = contextlib.nullcontext() if args.accelerate else vitkernels.use_backend("torch")
    args.accelerate = False
    with common.one_line_errors("mae"), plain:
        mae(args, common.start_processes())


if __name__ == "__main__":
    main()
