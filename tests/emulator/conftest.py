"""The emulator runs compiled kernels: Triton's interpreter must be off before Triton is imported."""

import os

os.environ.pop("TRITON_INTERPRET", None)
