"""Every public function on calls that nobody thought of, against the reference.

    pytest tests/fuzz                      the same few hundred calls each time, about two minutes on one core
    pytest tests/fuzz --fuzz-minutes 60    fresh random calls, an hour for each test below (-n auto: at once)

Hypothesis draws shapes, dtypes, strides, missing parameters, frozen ones and options (strategies.py); calls.py judges.
A failure prints the smallest call that fails; in this folder ``judge(Call(...))`` repeats it.
"""

import time

import pytest
from calls import Call, judge
from hypothesis import given
from strategies import CALLS


@pytest.mark.parametrize("op", CALLS)
def test_agrees_with_the_reference(op, device, request):
    @given(CALLS[op])
    def agrees(call: Call):
        judge(call, device=device)

    end = time.monotonic() + 60 * request.config.getoption("--fuzz-minutes", 0.0)
    while True:
        agrees()
        if time.monotonic() >= end:
            return
