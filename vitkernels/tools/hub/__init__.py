"""``python -m vitkernels.tools.hub``: write this library in the layout of Hugging Face's ``kernels`` hub.

The layout is that of a kernel without compiled parts (``torch-noarch``): ``build.toml`` and the sources below
``torch-ext``, and what ``kernels`` loads below ``build``, one folder a backend. ``kernels`` imports a folder under a
name that is unique to its content, so that several versions can live in one process. So all imports are made relative,
and the ops are registered under that name.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
from pathlib import Path, PurePosixPath

import vitkernels
from vitkernels.tools.console import UserError, check_can_fill, write_file

ROOT = Path(vitkernels.__file__).parent
NAME = "vitkernels"
VERSION = 0  # on the hub, a version whose interface may still change
LICENSE = "apache-2.0"
# Built for the CPU, too: there the ops run in PyTorch, or on the emulated GPU.
BACKENDS = {"cpu": None, "cuda": ["8.0+PTX"]}  # with the compute capabilities, from which on the kernels are compiled
PARTS = ("reference.py", "runtime.py", "emulator", "tuning", "ops", "layers")  # of the library
SUFFIXES = (".py", ".json", ".cpp", ".h")

_IMPORT = re.compile(rf"^( *from ){NAME}((?:\.\w+)*)(?= import )", re.M)

_INIT = '''"""Triton kernels for Vision Transformers, forward and backward: ops on tensors, and layers for kernelize."""

from . import layers, ops

__all__ = ["layers", "ops"]
'''

_BUILD = """[general]
name = "{name}"
version = {version}
edition = 5
license = "{license}"
backends = [{backends}]

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
pyext = [{suffixes}]
# The page on build.toml writes a hyphen, and the parser rejects it.
cuda_capabilities = [{capabilities}]
"""

_CARD = """---
library_name: kernels
license: {license}
tags:
- kernels
- vision-transformer
---

# {name}

Triton kernels for Vision Transformers, forward and backward. **Nothing has run on a GPU yet, so this claims no speed.**
They are compiled for five GPU architectures, from Ampere on, and an emulator executes the compiled code.

```python
from kernels import LayerRepository, Mode, get_kernel, kernelize, use_kernel_mapping

vitkernels = get_kernel("{repo_id}", version={version}, trust_remote_code=True)
y = vitkernels.ops.layer_norm(x, weight, bias)

norm = LayerRepository("{repo_id}", layer_name="LayerNorm", version={version}, trust_remote_code=True)
with use_kernel_mapping({{"LayerNorm": {{"cuda": norm}}}}):
    model = kernelize(model, mode=Mode.TRAINING, device="cuda")
```

A model's layers take part if their class is decorated with `use_kernel_forward_from_hub("LayerNorm")`, or named to
`replace_kernel_forward_from_hub(torch.nn.LayerNorm, "LayerNorm")`.

| layer | in place of | backward | torch.compile |
| --- | --- | --- | --- |
{layers}

The functions in `ops` are {functions}.

Launch configurations that were searched for a GPU are data, in `tuning/tables`; without a table for the GPU at hand, a
heuristic chooses. On a CPU the ops run in PyTorch.

This repository is built from the library's version {library} by `python -m vitkernels.tools.hub`.
"""


def build(out: Path, repo_id: str) -> None:
    """Write the repository ``repo_id`` into the folder ``out``, which is new or empty.

    Raises:
        UserError: The folder cannot be written, or holds something.
    """
    check_can_fill(out)
    if any(out.iterdir()):
        raise UserError(f"{out} is not empty: give a new folder")
    files = sources()
    content = hashlib.sha256(b"".join(name.encode() + b"\0" + text.encode() for name, text in sorted(files.items())))
    written = {f"torch-ext/{NAME}/{name}": text for name, text in files.items()}
    for backend, capabilities in BACKENDS.items():
        info = {"type": backend} | ({"archs": capabilities} if capabilities else {})
        metadata = {
            "name": NAME,
            "id": f"_{NAME}_{backend}_{content.hexdigest()[:8]}",
            "version": VERSION,
            "license": LICENSE,
            "python-depends": [],
            "backend": info,
            "digest": {"algorithm": "sha256", "files": {name: _digest(files[name]) for name in sorted(files)}},
        }
        written |= {f"build/torch-{backend}/{name}": text for name, text in files.items()}
        written[f"build/torch-{backend}/metadata.json"] = json.dumps(metadata, indent=2) + "\n"
    written["build.toml"] = _BUILD.format(
        name=NAME,
        version=VERSION,
        license=LICENSE,
        backends=_quoted(BACKENDS),
        repo_id=repo_id,
        suffixes=_quoted(suffix[1:] for suffix in SUFFIXES),
        capabilities=_quoted(BACKENDS["cuda"]),
    )
    written["CARD.md"] = card(repo_id)
    for name, text in written.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text)


def sources() -> dict[str, str]:
    """Return the package's files by their names in it: the library's parts, with relative imports, and the layers.

    The hub looks for layers in the module ``layers``. So its names are those of :mod:`vitkernels.tools.hub.layers`.
    """
    files = {"__init__.py": _INIT}
    for part in PARTS:
        for path in sorted((ROOT / part).rglob("*")) if (ROOT / part).is_dir() else [ROOT / part]:
            if path.suffix in SUFFIXES:
                files[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
    files["layers/__init__.py"] = (Path(__file__).parent / "layers.py").read_text(encoding="utf-8")
    return {name: relative(name, text) if name.endswith(".py") else text for name, text in files.items()}


def relative(name: str, text: str) -> str:
    """Return the module ``text`` at ``name`` with relative imports of the library.

    Raises:
        ValueError: It imports the library in another form than ``from vitkernels... import name`` on a line.
    """
    dots = "." * len(PurePosixPath(name).parts)
    text = _IMPORT.sub(lambda found: found[1] + dots + found[2].removeprefix("."), text)
    for node in ast.walk(ast.parse(text)):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if any(module.partition(".")[0] == NAME for module in modules):
            raise ValueError(f"{name}, line {node.lineno}: cannot be made relative; write `from {NAME} import …`")
    return text


def card(repo_id: str) -> str:
    """Return the repository's page."""
    from vitkernels import ops
    from vitkernels.tools.hub import layers

    classes = [cls for cls in vars(layers).values() if isinstance(cls, type) and cls.__module__ == layers.__name__]
    yes = {True: "yes", False: "no"}
    rows = []
    for cls in classes:
        replaced = cls.__doc__.splitlines()[0].rpartition("in place of ")[2].rstrip(".").replace("``", "`")
        rows.append(f"| `{cls.__name__}` | {replaced} | {yes[cls.has_backward]} | {yes[cls.can_torch_compile]} |")
    functions = ", ".join(f"`{name}`" for name in sorted(ops.__all__) if name.islower())
    return _CARD.format(
        license=LICENSE,
        name=NAME,
        repo_id=repo_id,
        version=VERSION,
        layers="\n".join(rows),
        functions=functions,
        library=vitkernels.__version__,
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _quoted(words) -> str:
    return ", ".join(f'"{word}"' for word in words)
