"""Fine-tune a Vision Transformer at a higher resolution by the recipe of arXiv 2010.11929.

    python examples/finetune.py --model run --data pets/train --val pets/val --out tuned
    python examples/finetune.py --model vit_base_patch16_224 --data pets/train --out tuned --lora 16

SGD with momentum 0.9, batches of 512, a learning rate that falls as a cosine, no weight decay, gradients clipped at
norm 1, one linear head that starts at zero, and interpolated position embeddings (§3.2 and Appendix B.1.1). ``--lora``
trains the head and low-rank updates (arXiv 2106.09685) of the blocks' linear layers by PEFT, and adds them to the
weights in the end. The result is model.safetensors, with the config.json by which timm loads it.

What happens when the run is killed: see examples/common.py; when an image does not decode: examples/image_data.py.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import common
import image_data
import torch
from embed import load_model
from torch import nn

from vitkernels.tools.console import UserError, one_line
from vitkernels.tools.names import read_config, resolve

ADAPTED = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"


def make_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """Return the model with its weights, at another image size, and with a linear head of zeros."""
    model, args.weights = load_model(args.model, args.checkpoint)
    if not all(hasattr(model, name) for name in ("blocks", "set_input_size", "head")):
        raise UserError(
            f"{args.model} has no blocks, or its image size is fixed; expected a Vision Transformer of timm"
        )
    model.set_input_size(args.img_size)
    model.reset_classifier(num_classes)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    return model


def adapt(model: nn.Module, rank: int, seed: int) -> nn.Module:
    """Add low-rank updates to the layers of ``model``, freeze all else but the head, and return PEFT's view of it."""
    try:
        import peft
    except ImportError as error:
        raise UserError(f"--lora needs peft ({one_line(error)}): pip install peft") from error
    torch.manual_seed(seed)
    try:
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=ADAPTED))
    except ValueError as error:
        raise UserError(f"--lora: {one_line(error)}") from error
    model.head.requires_grad_(True)
    return adapted


def finetune(args: argparse.Namespace) -> None:
    """Train, write the weights, and classify the held-out images if there are any.

    Raises:
        UserError: The data, the model, the output or a checkpoint stands in the way; the text says how.
    """
    processes = common.start_processes()
    common.check_options(args, processes)
    data, held_out = image_data.open_both(args)
    vit = make_model(args, data.num_classes)
    adapted = copy.deepcopy(adapt(vit, args.lora, args.seed)) if args.lora else None  # takes the weights in the end
    model = common.prepare(vit, args, processes)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=args.learning_rate, momentum=0.9)
    transform = image_data.train_transform(args.img_size, args.crop_scale, args.flip)
    common.train(args, processes, model, optimizer, data, args.steps, common.label_loss, transform)
    weights = common.whole_weights(model)
    if processes.rank == 0:
        if adapted is not None:
            adapted.base_model.model.load_state_dict(weights)
            weights = adapted.merge_and_unload().state_dict()
        architecture, options = args.model, {}
        if (named := resolve(args.model, may_download=True)).kind == "folder":
            config = read_config(named.name)
            architecture, options = config["architecture"], config.get("model_args", {})
        common.export(args.out, weights, architecture, data.num_classes, vit, **{**options, "img_size": args.img_size})
    if held_out is not None:
        common.print_accuracy(args, processes, model, held_out)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, train, and turn errors into one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_options(parser, img_size=384, batch_size=512, learning_rate=0.01, warm_up=500)
    add = parser.add_argument
    add("--model", required=True, help="timm's model by name, with its pretrained weights, or a folder of pretrain.py")
    add("--checkpoint", type=Path, metavar="FILE", help="weights to start from in place of the model's own")
    add("--steps", type=common.positive, default=20_000, help="of the optimizer (%(default)s)")
    add("--lora", type=common.positive, metavar="RANK", help="train updates of this rank, not the weights")
    args = parser.parse_args(argv)
    with common.one_line_errors("finetune"):
        finetune(args)


if __name__ == "__main__":
    main()
