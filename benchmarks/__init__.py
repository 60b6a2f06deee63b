"""Benchmarks of vitkernels against PyTorch, torch.compile and other libraries: ``python -m benchmarks --help``."""
