"""The self-test of ``verify``: defects in the kernels, which its own checks must catch, else they prove nothing."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator

import torch

from vitkernels.testing.cases import DTYPES
from vitkernels.verify.accuracy import check_accuracy
from vitkernels.verify.mutants.defects import MUTANTS
from vitkernels.verify.mutants.seeding import Mutant, MutantError, seeded_defect
from vitkernels.verify.problems import QUICK, Problem, problems
from vitkernels.verify.properties import check_layouts, check_memory, check_nonfinite, check_reruns
from vitkernels.verify.results import Check, Result

__all__ = [
    "MUTANTS",
    "Mutant",
    "MutantError",
    "catch",
    "check_mutants",
    "interpreted",
    "mutant_checks",
    "print_caught",
    "seeded_defect",
    "shown_by",
    "total",
]

ENOUGH = 0.95  # of all mutants

_GROUPS = {
    "accuracy": check_accuracy,
    "layouts": functools.partial(check_layouts, every=False),
    "memory": check_memory,
    "nonfinite": functools.partial(check_nonfinite, every=False),
    "reruns": functools.partial(check_reruns, times=2),
}


def mutant_checks(device: torch.device, seed: int) -> Iterator[Check]:
    """Yield one check a mutant; :func:`total` judges what they found together.

    On a GPU one check makes them all, in a process whose kernels are interpreted: which kernels run there hangs on the
    GPU and the dtype, and each defect would have all of them compiled anew.
    """
    if device.type != "cpu":
        yield Check("mutants/interpreted", functools.partial(interpreted, [m.name for m in MUTANTS], seed))
        return
    for mutant in MUTANTS:
        yield Check(f"mutants/{mutant.name}", functools.partial(_one, mutant, device, seed))


def check_mutants(device: torch.device, seed: int, mutants: Iterable[Mutant] = MUTANTS) -> Iterator[Result]:
    """Yield a result for each of ``mutants``, and last their total."""
    results = []
    for mutant in mutants:
        results.append(catch(mutant, device, seed))
        yield results[-1]
    yield total(results)


def total(results: Iterable[Result]) -> Result:
    """Judge the results of :func:`catch`: at least 95 % of the mutants must have been caught."""
    results = [r for r in results if r.group == "mutants"]
    caught = sum(r.status == "passed" for r in results)
    survivors = "".join(f"; {r.check.partition('/')[2]}: {r.detail}" for r in results if r.status != "passed")
    enough = results and caught >= ENOUGH * len(results)
    return Result("mutants", "caught", "passed" if enough else "broken", f"{caught} of {len(results)}{survivors}")


def catch(mutant: Mutant, device: torch.device, seed: int) -> Result:
    """Run, with ``mutant``'s defect inside, the checks that should show it, the smallest first, until one fails.

    Returns:
        ``passed``, with what caught it, or ``skipped``: it survived, it could not be made, or it could not run, which
        is no proof that a check sees it.
    """
    ran = []

    def result(status: str, detail: str, ratio: float | None = None) -> Result:
        return Result(f"mutants/{mutant.name}", "caught", status, detail, ratio, mutant.dtype)

    try:
        with seeded_defect(mutant):
            for problem in shown_by(mutant):
                ran.append(f"{mutant.by}/{problem.id}/{mutant.dtype}")
                for found in _GROUPS[mutant.by](ran[-1], problem, DTYPES[mutant.dtype], device, seed):
                    if found.status == "failed":
                        return result("passed", f"by {ran[-1]}: {found.name}: {found.detail}", found.ratio)
    except MutantError as error:
        return result("skipped", f"cannot be made: {error}")
    except Exception as error:  # a kernel may raise anything
        return result("skipped", f"cannot run: {type(error).__name__}: {error}")
    return result("skipped", f"survived {', '.join(ran) or 'as no problem is of its op and variant'}")


def print_caught(names: Collection[str], seed: int) -> None:
    """Print the result of :func:`catch` for each mutant of these names on the CPU, one a line, as JSON."""
    torch.set_num_threads(1)
    for mutant in MUTANTS:
        if mutant.name in names:
            print(json.dumps(dataclasses.asdict(catch(mutant, torch.device("cpu"), seed))), flush=True)


def interpreted(names: Collection[str], seed: int) -> Iterator[Result]:
    """Yield what :func:`print_caught` prints in a process of its own whose kernels are interpreted."""
    code = f"from vitkernels.verify.mutants import print_caught; print_caught({list(names)!r}, {seed})"
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as process:
        yield from (Result(**json.loads(line)) for line in process.stdout)
    if process.returncode:
        yield Result("mutants/interpreted", "ran", "broken", f"the process ended with {process.returncode}")


def _one(mutant: Mutant, device: torch.device, seed: int) -> Iterator[Result]:
    yield catch(mutant, device, seed)


def shown_by(mutant: Mutant) -> Iterator[Problem]:
    """Yield the problems that should show ``mutant``, the smallest first."""
    for case in QUICK if mutant.case is None else (mutant.case,):
        for problem in problems(case):
            if problem.op == mutant.op and mutant.variant in (None, problem.variant):
                yield problem
