"""Some of all combinations of parameters, where each has to be compiled."""

import itertools
import random


def drawn(n, *axes):
    """Return ``n`` rows of a value of each axis: all values of an axis as often, in an order drawn once for all."""
    rng = random.Random(0)
    columns = []
    for axis in axes:
        column = list(itertools.islice(itertools.cycle(axis), n))
        rng.shuffle(column)
        columns.append(column)
    return list(zip(*columns, strict=True))
