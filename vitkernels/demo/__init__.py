"""What ``vitkernels demo`` and ``vitkernels classify`` do: data, comparison, pictures."""
