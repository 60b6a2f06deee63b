"""Every public function on calls that nobody thought of, against the reference.

    pytest tests/fuzz                      the same few calls each time, a minute on one core: all are compiled
    pytest tests/fuzz --fuzz-minutes 60    fresh random calls, an hour for each test below (-n auto: at once)

Hypothesis draws shapes, dtypes, strides, missing parameters, frozen ones and options (strategies.py); calls.py judges.
A failure prints the smallest call that fails; in this folder ``judge(Call(...))`` repeats it.
"""

import time

import pytest
from calls import Call, judge
from hypothesis import given, settings
from strategies import CALLS, FP8_CALLS

CALLS = CALLS | FP8_CALLS
EXAMPLES = {op: 1 if op == "block" or "attention" in op else 2 for op in CALLS}


@pytest.mark.parametrize("op", CALLS)
def test_agrees_with_the_reference(op, device, request):
    minutes = request.config.getoption("--fuzz-minutes", 0.0)
    drawn = []

    @given(CALLS[op])
    @settings(max_examples=200 if minutes else 1 + EXAMPLES.get(op, 3))
    def agrees(call: Call):
        drawn.append(call)
        if minutes or len(drawn) > 1:  # Hypothesis begins with the least of all: one element
            judge(call, device=device)

    end = time.monotonic() + 60 * minutes
    while True:
        agrees()
        if time.monotonic() >= end:
            return
