"""Packaging. Tool settings live in pyproject.toml; the versions that CI tests, in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "vitkernels" / "__init__.py").read_text(), re.M).group(1)

# CPU builds of torch come without Triton, CUDA builds with their own. ROCm and XPU builds bring it under other
# names, which a hard requirement would overwrite: it is an extra.
TRITON = ["triton>=3.6; platform_system == 'Linux'", "numpy"]  # the emulator needs it
TIMM = ["timm>=1.0.20", "torchvision"]
HF = ["transformers>=4.50", "safetensors"]
COMPILER = ["ziglang; platform_system == 'Linux'"]  # for the emulator's engine, where a machine has no C++ compiler
DEMO = [*TRITON, *COMPILER, "matplotlib", "pillow>=10.1", "rich", "safetensors", "scikit-learn"]
BENCH = [*TRITON, *TIMM, "matplotlib", "pytest-benchmark", "rich"]  # benchmarks/ runs from a checkout
DOCS = ["mkdocs", "mkdocs-material", "mkdocstrings[python]", "ruff"]  # ruff lays out signatures
TEST = [
    *DEMO,
    *TIMM,
    *HF,
    "accelerate",
    "bitsandbytes",
    "datasets",  # examples/image_data.py, as webdataset
    "expecttest",
    "hypothesis",
    "lightning",
    "open_clip_torch",
    "peft",
    "pyarrow",  # examples/embed.py
    "pytest",
    "pytest-benchmark",
    "pytest-timeout",
    "pytest-xdist",
    "tensorboard",  # examples/common.py
    "torchao",
    "webdataset",
]

setup(
    name="vitkernels",
    version=VERSION,
    description="Triton kernels for Vision Transformers, forward and backward, and one call that swaps them in",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The vitkernels authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="vision transformer, ViT, Triton, CUDA, GPU kernels, attention, PyTorch, timm, transformers, torchvision",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["vitkernels", "vitkernels.*"]),
    package_data={
        "vitkernels": [
            *("py.typed", "tuning/tables/*.json", "emulator/engine/*"),
            *("tools/aot/contract/*.json", "tools/demo/*.safetensors"),
        ]
    },
    install_requires=["torch>=2.11"],
    extras_require={
        "triton": TRITON,
        "timm": TIMM,
        "hf": HF,
        "demo": DEMO,
        "bench": BENCH,
        "test": TEST,
        "docs": DOCS,
        "dev": [*TEST, *DOCS, "pre-commit"],
    },
    entry_points={
        "console_scripts": ["vitkernels = vitkernels.__main__:main"],
        "pytest11": ["vitkernels = vitkernels.tools.verify.pytest_plugin"],
    },
)
