"""What vitkernels costs and gains, measured so that a sceptic would accept it: ``python -m benchmarks --help``."""
