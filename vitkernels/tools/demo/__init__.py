"""The commands ``vitkernels demo`` and ``vitkernels classify``: data, comparison, pictures."""
