"""Package a Vision Transformer of timm with AOTInductor, and answer requests with the package over HTTP.

    python examples/serve.py package vit.pt2 --model vit_base_patch16_224 --pretrained
    python examples/serve.py run vit.pt2 --port 8000
    curl --data-binary @cat.jpg localhost:8000

The package is one file: weights and compiled code for batches of 1 to --max-batch images, which it takes as uint8. With
a GPU it computes in bf16 on the kernels of vitkernels, else in fp32 as timm does. It is for the kind of device and the
version of PyTorch that made it.

The server decodes each request in a thread of its own. One thread runs the package on whatever images wait, so batches
grow with the load, and a single request never waits for others. The answer is JSON, {"outputs": [...]}: what the model
returns for the image. Else it is {"error": "..."}, with status 400 for an image that cannot be read.

The package calls the kernels as PyTorch's registered ops. So a process that loads it must first import vitkernels.ops,
as this one does. Else aoti_load_package raises "Could not find schema for vitkernels::...".
"""

from __future__ import annotations

import argparse
import io
import json
import queue
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from torch import Tensor, nn

import vitkernels
import vitkernels.ops  # registers the ops that the package calls
from vitkernels.models.weights import read_weights
from vitkernels.tools.console import UserError, check_can_write, import_timm, one_line, write_file
from vitkernels.tools.demo.image import open_image
from vitkernels.tools.names import build, resolve

KEY = "serve"  # of the package's metadata, beside PyTorch's own
LARGEST_REQUEST = 64 << 20  # bytes


class FromPixels(nn.Module):
    """A model that takes pixels as they are decoded: (B, 3, Y, X) in uint8 → (B, C) in fp32."""

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.model = model
        self.dtype = next(model.parameters()).dtype
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(((pixels / 255 - self.mean) / self.std).to(self.dtype)).float()


def load_model(name: str, checkpoint: Path | None) -> nn.Module:
    """Build timm's model ``name`` with its pretrained weights, or with those at ``checkpoint``."""
    options = {}
    try:
        state = None if checkpoint is None else read_weights(checkpoint)
        if state is not None and "head.bias" in state:
            options["num_classes"] = len(state["head.bias"])
        model, _ = build(resolve(name, may_download=True).for_timm, weights=state is None, **options)
        if state is not None:
            model.load_state_dict(state)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{checkpoint} cannot be loaded into {name}: {one_line(error)}") from error
    return model.eval()


def package(args: argparse.Namespace) -> None:
    """Write the package, whole or not at all.

    Raises:
        UserError: The model, its weights or the output stand in the way; the text says how.
    """
    check_can_write(args.package)
    timm = import_timm()
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = load_model(args.model, args.checkpoint).to(device, dtype)
    config = timm.data.resolve_model_data_config(model)
    vitkernels.accelerate(model)
    pixels = torch.zeros(2, *config["input_size"], dtype=torch.uint8, device=device)  # of a batch of 1, export fixes it
    batch = torch.export.Dim("batch", min=1, max=args.max_batch)
    notes = {"model": args.model, "device": device, "max_batch": args.max_batch, "config": config}
    notes["torch"] = torch.__version__
    with torch.no_grad():
        served = FromPixels(model, config["mean"], config["std"]).to(device)
        if served(pixels).ndim != 2:
            raise UserError(f"{args.model} does not return one vector an image")
        program = torch.export.export(served, (pixels,), dynamic_shapes=({0: batch},))
        made = io.BytesIO()
        options = {"aot_inductor.metadata": {KEY: json.dumps(notes)}}
        torch._inductor.aoti_compile_and_package(program, package_path=made, inductor_configs=options)
    write_file(args.package, made.getvalue())
    ops = sum(str(node.target).startswith("vitkernels.") for node in program.graph.nodes)
    print(f"serve: wrote {args.package} for {device}, with {ops} calls of vitkernels' ops")


class Runner:
    """Runs a package in a thread of its own, on batches of whatever images wait.

    Attributes:
        notes: What :func:`package` noted of the model.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise UserError(f"there is no package {path}")
        try:
            self._run = torch._inductor.aoti_load_package(str(path))
            self.notes = json.loads(self._run.get_metadata()[KEY])
        except Exception as error:  # PyTorch raises many kinds of errors for invalid bytes
            raise UserError(f"{path} cannot be loaded as a package of this program ({one_line(error)})") from error
        if self.notes["torch"] != torch.__version__:
            raise UserError(f"{path} was made by torch {self.notes['torch']}, and this is {torch.__version__}")
        if self.notes["device"] == "cuda" and not torch.cuda.is_available():
            raise UserError(f"{path} was made for a GPU, and there is none")
        self._waiting: queue.SimpleQueue[tuple[Tensor, Future]] = queue.SimpleQueue()
        for count in (1, self.notes["max_batch"]):  # compiles the kernels before the first request
            self.run(torch.zeros(count, *self.notes["config"]["input_size"], dtype=torch.uint8))
        threading.Thread(target=self._work, daemon=True).start()

    def run(self, pixels: Tensor) -> Tensor:
        """Return the model's outputs, (B, C) in fp32 on the CPU, for pixels (B, 3, Y, X) in uint8, B ≤ max_batch."""
        with torch.no_grad():
            return self._run(pixels.to(self.notes["device"])).cpu()

    def submit(self, pixels: Tensor) -> Future:
        """Queue an image (3, Y, X) in uint8; the future gets its outputs (C,)."""
        future: Future = Future()
        self._waiting.put((pixels, future))
        return future

    def _work(self) -> None:
        while True:
            batch = [self._waiting.get()]
            while len(batch) < self.notes["max_batch"] and not self._waiting.empty():
                batch.append(self._waiting.get())
            images, futures = zip(*batch, strict=True)
            try:
                for future, outputs in zip(futures, self.run(torch.stack(images)), strict=True):
                    future.set_result(outputs)
            except Exception as error:  # each request says so, and the next ones are tried
                for future in futures:
                    future.set_exception(error)


class Upload(io.BytesIO):
    """The bytes of a request, as errors name it."""

    def __str__(self) -> str:
        return "the image"


def make_handler(runner: Runner, transform: Callable) -> type[BaseHTTPRequestHandler]:
    """Return the class that answers requests: a POST of an image's bytes."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60  # seconds that a connection may be silent

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > LARGEST_REQUEST:
                self.close_connection = True  # the body was not read
                self.answer(413, error=f"expected a Content-Length of at most {LARGEST_REQUEST} bytes")
                return
            body = self.rfile.read(int(length))
            try:
                pixels = transform(open_image(Upload(body)))
            except Exception as error:  # also of the transform: an image may be too narrow to be resized
                self.answer(400, error=one_line(error))
                return
            try:
                outputs = runner.submit(pixels).result().tolist()
            except Exception as error:  # whatever the package raised
                self.answer(500, error=one_line(error))
            else:
                self.answer(200, outputs=outputs)

        def answer(self, status: int, **content: object) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_request(self, code="-", size="-") -> None:
            """Only errors are logged."""

    return Handler


def run(args: argparse.Namespace) -> None:
    """Answer requests until the process is told to stop.

    Raises:
        UserError: The package cannot be run, or the address cannot be taken.
    """
    timm = import_timm()
    runner = Runner(args.package)
    transform = timm.data.create_transform(**runner.notes["config"], is_training=False, normalize=False)
    try:
        server = ThreadingHTTPServer((args.host, args.port), make_handler(runner, transform))
    except OSError as error:
        raise UserError(f"cannot listen at {args.host}:{args.port}: {error.strerror}") from error
    signal.signal(signal.SIGTERM, stop)  # how containers stop a program
    with server:
        what = f"{runner.notes['model']} on {runner.notes['device']}"
        print(f"serve: {what} at http://{args.host}:{server.server_port}", flush=True)
        server.serve_forever()


def package_file(text: str) -> Path:
    """Read the name of a package."""
    if not text.endswith(".pt2"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .pt2, without which PyTorch loads no package")
    return Path(text)


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Return a reader of whole numbers from ``least`` to ``most``."""

    def read(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
        return int(text)

    return read


def stop(*_: object) -> None:
    """End as on Ctrl-C."""
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> None:
    """Read the command line, package or serve, and turn errors into one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("package", help="write a package")
    make.set_defaults(command=package)
    make.add_argument("package", type=package_file, metavar="FILE.pt2", help="the file to write")
    make.add_argument("--model", required=True, help="a model of timm by name, or a folder with its config.json")
    weights = make.add_mutually_exclusive_group(required=True)
    weights.add_argument("--pretrained", action="store_true", help="the model's own weights, which may be downloaded")
    weights.add_argument("--checkpoint", "--weights", type=Path, metavar="FILE", help="a state dict or checkpoint")
    make.add_argument(
        "--max-batch", type=whole_number(2, 4096), default=64, metavar="N", help="images at once (%(default)s)"
    )
    serve = commands.add_parser("run", help="serve a package over HTTP")
    serve.set_defaults(command=run)
    serve.add_argument("package", type=package_file, metavar="FILE.pt2", help="what the command package wrote")
    serve.add_argument("--host", default="127.0.0.1", help="the address to listen at (%(default)s: this machine only)")
    serve.add_argument("--port", type=whole_number(0, 65535), default=8000, help="0 for a free one (%(default)s)")
    args = parser.parse_args(argv)
    try:
        args.command(args)
    except UserError as error:
        sys.exit(f"serve: {error}")
    except KeyboardInterrupt:
        sys.exit("serve: stopped")


if __name__ == "__main__":
    main()
