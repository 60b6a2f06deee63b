"""Train a Vision Transformer of timm from scratch by the recipe of arXiv 2010.11929.

    python examples/pretrain.py --data imagenet/train --val imagenet/val --out run
    torchrun --nproc-per-node 8 examples/pretrain.py --data shards --out run --parallel fsdp --compile

Adam with β 0.9 and 0.999 and weight decay 0.1, batches of 4,096 by accumulation, a learning rate that rises over 10,000
steps and then falls, gradients clipped at norm 1, and a head with one hidden layer (Appendix B.1). The weights without
that head end in model.safetensors, with the config.json by which timm and examples/finetune.py load them.

What happens when the run is killed: see examples/common.py; when an image does not decode: examples/image_data.py.
"""

from __future__ import annotations

import argparse
import math

import common
import image_data
import torch
from torch import nn

from vitkernels.tools.console import UserError
from vitkernels.tools.names import build, resolve


def make_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """Return timm's model with random weights, and with a head of one hidden layer (tanh), §3.1."""
    torch.manual_seed(args.seed)
    options = {"img_size": args.img_size, "num_classes": num_classes, "proj_drop_rate": args.dropout}
    options |= {"pos_drop_rate": args.dropout, "drop_path_rate": args.drop_path}
    if twice := options.keys() & args.model_kwargs.keys():
        raise UserError(f"--model-kwargs gives {', '.join(sorted(twice))}, which the other options or the data give")
    model, _ = build(resolve(args.model).for_timm, **options, **args.model_kwargs)
    if not (isinstance(getattr(model, "head", None), nn.Linear) and hasattr(model, "blocks")):
        raise UserError(f"{args.model} has no blocks or no linear head; expected a Vision Transformer of timm")
    hidden = nn.Linear(model.head.in_features, model.head.in_features)
    nn.init.trunc_normal_(hidden.weight, std=0.02)
    nn.init.zeros_(hidden.bias)
    model.head = nn.Sequential(hidden, nn.Tanh(), model.head)
    return model


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Return Adam with decoupled weight decay of the matrices."""
    groups = common.decay_groups(model, args.weight_decay)
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.999))


def pretrain(args: argparse.Namespace) -> None:
    """Train, write the weights, and classify the held-out images if there are any.

    Raises:
        UserError: The data, the model, the output or a checkpoint stands in the way; the text says how.
    """
    processes = common.start_processes()
    common.check_options(args, processes)
    data, held_out = image_data.open_both(args)
    vit = make_model(args, data.num_classes)
    model = common.prepare(vit, args, processes)
    steps = math.ceil(args.epochs * len(data) / args.batch_size)
    transform = image_data.train_transform(args.img_size, args.crop_scale, args.flip)
    common.train(args, processes, model, make_optimizer(args, model), data, steps, common.label_loss, transform)
    weights = common.whole_weights(model)
    if processes.rank == 0:
        body = {name: weight for name, weight in weights.items() if not name.startswith("head.")}
        common.export(args.out, body, args.model, 0, vit, img_size=args.img_size, **args.model_kwargs)
    if held_out is not None:
        common.print_accuracy(args, processes, model, held_out)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, train, and turn errors into one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_options(parser, img_size=224, batch_size=4096, learning_rate=8e-4, warm_up=10_000)
    parser.set_defaults(decay="linear")
    add = parser.add_argument
    add("--model", default="vit_base_patch16_224", help="a Vision Transformer of timm by name (%(default)s)")
    add("--model-kwargs", nargs="+", action=common.KeyValues, default={}, metavar="KEY=VALUE", help="changes to it")
    add("--epochs", type=common.number(float, 0), default=7, help="passes over the data (%(default)s)")
    add("--weight-decay", type=common.number(float, 0), default=0.1, help="of matrices (%(default)s)")
    add(
        "--dropout",
        type=common.number(float, 0, 1),
        default=0.0,
        help="of positions and of all products but qkv (%(default)s)",
    )
    add(
        "--drop-path",
        type=common.number(float, 0, 1),
        default=0.0,
        help="of whole branches, in the last block (%(default)s)",
    )
    args = parser.parse_args(argv)
    with common.one_line_errors("pretrain"):
        pretrain(args)


if __name__ == "__main__":
    main()
