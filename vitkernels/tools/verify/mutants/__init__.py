"""The self-test of ``verify``: seed defects in the kernels, which its checks must catch, or they prove nothing."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator

import torch

from vitkernels import runtime
from vitkernels.testing.cases import DTYPES
from vitkernels.tools.console import one_line
from vitkernels.tools.verify.accuracy import check_accuracy
from vitkernels.tools.verify.mutants import defects, seeding
from vitkernels.tools.verify.mutants.compiled import COMPILED, CompiledMutant, seeded_in_ptx
from vitkernels.tools.verify.mutants.seeding import Mutant, MutantError
from vitkernels.tools.verify.problems import QUICK, Problem, fp8_problems, problems
from vitkernels.tools.verify.properties import check_layouts, check_memory, check_nonfinite, check_reach, check_reruns
from vitkernels.tools.verify.results import Check, Result

__all__ = [
    "MUTANTS",
    "CompiledMutant",
    "Mutant",
    "MutantError",
    "catch",
    "check_mutants",
    "mutant_checks",
    "seeded_defect",
    "shown_by",
    "total",
]

ENOUGH = 0.95  # share of the mutants to be caught

MUTANTS: tuple[Mutant | CompiledMutant, ...] = defects.MUTANTS + COMPILED

_GROUPS = {
    "accuracy": check_accuracy,
    "layouts": functools.partial(check_layouts, every=False),
    "memory": check_memory,
    "nonfinite": functools.partial(check_nonfinite, every=False),
    "reach": check_reach,
    "reruns": functools.partial(check_reruns, times=2),
}


def mutant_checks(seed: int) -> Iterator[Check]:
    """Yield one check per mutant; :func:`total` judges their results together.

    They always run on an emulated H100, because the GPU decides which kernels run.
    """
    for mutant in MUTANTS:
        yield Check(f"mutants/{mutant.name}", functools.partial(_one, mutant, seed))


def check_mutants(
    device: torch.device, seed: int, mutants: Iterable[Mutant | CompiledMutant] = MUTANTS
) -> Iterator[Result]:
    """Yield a result for each of ``mutants``, and then their total."""
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


def catch(mutant: Mutant | CompiledMutant, device: torch.device, seed: int) -> Result:
    """Seed ``mutant``'s defect and run the checks that should catch it, the smallest first, until one fails.

    An error that the emulator reports counts as a failed check.

    Returns:
        ``passed``, with the check that caught it. Or ``skipped``: it survived, it could not be made, or a check
        raised another exception, which does not prove that a check catches it.
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
    except _emulation_error() as error:
        return result("passed", f"by {ran[-1]}: the emulator: {one_line(error)}")
    except Exception as error:  # a kernel may raise anything
        return result("skipped", f"cannot run: {type(error).__name__}: {error}")
    return result("skipped", f"survived {', '.join(ran) or 'as no problem is of its op and variant'}")


def _emulation_error() -> type[Exception]:
    from vitkernels.emulator.launch import EmulationError  # needs Triton, so it is imported late

    return EmulationError


def _one(mutant: Mutant | CompiledMutant, seed: int) -> Iterator[Result]:
    with runtime.use_backend("emulated"):
        yield catch(mutant, torch.device("cpu"), seed)


def seeded_defect(mutant: Mutant | CompiledMutant) -> contextlib.AbstractContextManager:
    """Seed ``mutant``'s defect for a ``with`` block.

    Raises:
        MutantError: The function or the text to edit does not exist.
    """
    return (seeded_in_ptx if isinstance(mutant, CompiledMutant) else seeding.seeded_defect)(mutant)


def shown_by(mutant: Mutant | CompiledMutant) -> Iterator[Problem]:
    """Yield the problems on which checks should catch ``mutant``, the smallest first."""
    for case in QUICK if mutant.case is None else (mutant.case,):
        for problem in (*problems(case), *fp8_problems(case)):
            if problem.op == mutant.op and mutant.variant in (None, problem.variant):
                yield problem
