"""Count what one block of a Vision Transformer launches on a GPU: plain, by torch.compile, accelerated.

A launch is a Triton kernel, or an op of PyTorch that computes something: views, allocations, no-ops and ops on empty
tensors are none. An op of PyTorch counts as one, though some launch two kernels or more, as a sum over many rows or the
backward of LayerNorm or attention do; Inductor's kernels are counted one by one. The contract holds how many launches
the accelerated block may take: no change may make them more.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Sequence
from pathlib import Path

from vitkernels.tools import _interrupt
from vitkernels.tools.aot.block import PHASES, PROVIDERS, Setting, counted_blocks
from vitkernels.tools.aot.recorder import Event
from vitkernels.tools.console import UserError, one_line, print_table
from vitkernels.tools.names import resolve

CONTRACT = Path(__file__).parent / "contract" / "launches.json"
BATCH = 256  # of a model that the contract does not know
DROP_PATH = 0.1

NOTE = """
Views, allocations and ops on empty tensors are no launches. An op of PyTorch counts as one, though on a GPU some take
two kernels or more: a sum over many rows, the backward of LayerNorm and of attention. Inductor's kernels, named by the
ops that they fuse, count one by one. Under autocast the casts of the weights count, once a block.
"""

Launches = dict[str, list[Event]]  # by phase
Numbers = dict[str, dict[str, int]]  # by setting and phase


def load(path: Path = CONTRACT) -> dict[str, dict]:
    """Return the contract: by model its batch, the goals, and the launches, both by setting and phase.

    Raises:
        ValueError: The file does not have the form that :func:`save` writes.
    """
    if not path.exists():
        return {}
    contract = json.loads(path.read_text())
    for model, known in contract.items():
        if known.keys() != {"batch", "goals", "launches"}:
            raise ValueError(f"{path}: {model} must hold batch, goals and launches; got {', '.join(known)}")
        for numbers in (*known["goals"].values(), *known["launches"].values()):
            if not numbers.keys() <= set(PHASES) or any(type(n) is not int for n in numbers.values()):
                raise ValueError(f"{path}: {model} must hold numbers by {' | '.join(PHASES)}; got {numbers}")
    return contract


def save(contract: dict[str, dict], path: Path = CONTRACT) -> None:
    """Write the contract."""
    with _interrupt.writing():
        path.write_text(json.dumps(contract, indent=1) + "\n")


def check(known: Numbers, found: Numbers) -> tuple[list[str], list[str]]:
    """Return what is worse in ``found`` than in ``known`` or missing there, and what is better, a line each."""
    worse, better = [], []
    for setting, numbers in found.items():
        for phase, number in numbers.items():
            before = known.get(setting, {}).get(phase)
            if before is None:
                worse.append(f"{setting}, {phase}: {number} launches are not in the contract")
            elif number != before:
                (worse if number > before else better).append(f"{setting}, {phase}: {before} → {number} launches")
    return worse, better


def update(known: Numbers, found: Numbers, *, accept_worse: bool) -> Numbers:
    """Return ``known`` with what is new or better in ``found``; with ``accept_worse``, what is worse too."""
    after: Numbers = {}
    for setting, numbers in found.items():
        before = known.get(setting, {})
        after[setting] = {
            phase: number if accept_worse else min(number, before.get(phase, number))
            for phase, number in numbers.items()
        }
    return after


def count_launches(model_name: str, batch: int) -> dict[str, dict[str, Launches]]:
    """Return what one block of ``model_name`` launches, by setting and by who computes it.

    Raises:
        UserError: timm is missing or does not know the name.
        ValueError: The model is no Vision Transformer.
    """
    counted = {}
    for setting in (Setting(batch), Setting(batch, autocast=True), Setting(batch, drop_path=DROP_PATH)):
        # Inductor draws random numbers on a GPU alone.
        providers = [name for name in PROVIDERS if name != "torch.compile" or not setting.drop_path]
        counted[str(setting)] = counted_blocks(model_name, setting, providers)
    return counted


def run_launches(
    model_name: str,
    *,
    batch: int | None = None,
    update_contract: bool = False,
    accept_worse: bool = False,
    path: Path = CONTRACT,
) -> tuple[bool, dict[str, object]]:
    """Print what one block of ``model_name`` launches, and hold the accelerated one to the contract.

    Args:
        model_name: As for :func:`vitkernels.tools.names.resolve`; it is counted at its default image size.
        batch: Number of images; that of the contract if None, or 256 if the contract does not know the model.
        update_contract: Write new and better numbers into the contract.
        accept_worse: Also write worse ones.
        path: The contract's file.

    Returns:
        Whether the contract holds, and all that was counted as JSON types.

    Raises:
        UserError: timm is missing or does not know the name, or the contract cannot be read or written.
        ValueError: The model is no Vision Transformer, ``batch`` is below 1, or the contract is for another batch.
    """
    try:
        contract = load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"the contract of launches: {one_line(error)}") from error
    name = resolve(model_name).for_timm.name
    known = contract.get(name)
    batch = batch if batch is not None else known["batch"] if known else BATCH
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected 1 or more")
    if update_contract and known and batch != known["batch"]:
        raise ValueError(f"the contract holds {model_name} at batch {known['batch']}; --update got batch {batch}")
    counted = count_launches(model_name, batch)
    ours = {setting: _numbers(blocks["vitkernels"]) for setting, blocks in counted.items()}

    print(f"Launches of one block of {model_name}, batch {batch}\n")
    print_table(*summary(counted, known["goals"] if known else {}))
    first, blocks = next(iter(counted.items()))
    print(f"\nBy name, {first}; a name with _ in front is a Triton kernel of ours:\n")
    print_table(*by_name(blocks))
    print(NOTE)
    holds = True
    if update_contract:
        goals = known["goals"] if known else {}
        before = known["launches"] if known else {}
        after = update(before, ours, accept_worse=accept_worse)
        contract[name] = known = {"batch": batch, "goals": goals, "launches": after}
        try:
            save(contract, path)
        except OSError as error:
            raise UserError(f"the contract of launches: {one_line(error)}") from error
    if known is None:
        print("The contract does not hold this model; --update takes it in.")
    elif batch != known["batch"]:
        print(f"The contract holds this model at batch {known['batch']}: nothing is checked.")
    else:
        worse, better = check(known["launches"], ours)
        for line in better:
            print(f"Better (--update takes it over): {line}")
        for line in worse:
            print(f"Broken: {line}")
        holds = not worse
    return holds, {
        "model": model_name,
        "batch": batch,
        "goals": known["goals"] if known else {},
        "launches": {
            setting: {
                name: {phase: [event.op for event in events] for phase, events in phases.items()}
                for name, phases in blocks.items()
            }
            for setting, blocks in counted.items()
        },
    }


def _numbers(launches: Launches) -> dict[str, int]:
    return {phase: len(events) for phase, events in launches.items()}


def summary(counted: dict[str, dict[str, Launches]], goals: Numbers) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Return header and rows: the launches of each block in each setting, by phase, and the goals."""
    rows = []
    for setting, blocks in counted.items():
        for name in PROVIDERS:
            numbers = _numbers(blocks[name]) if name in blocks else {}
            rows.append((setting, PROVIDERS[name], *(str(numbers.get(phase, "not counted")) for phase in PHASES)))
        if goal := goals.get(setting):
            rows.append((setting, "goal", *(f"at most {goal[phase]}" if phase in goal else "" for phase in PHASES)))
    return ("dtype", "block", *PHASES), rows


def by_name(blocks: dict[str, Launches]) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Return header and rows: how often each block launches what, by phase."""
    rows = []
    for phase in PHASES:
        numbers = {name: collections.Counter(event.name for event in blocks[name][phase]) for name in blocks}
        for op in dict.fromkeys(op for name in reversed(numbers) for op in numbers[name]):
            rows.append((phase, op, *(str(numbers[name][op] or "") for name in numbers)))
    return ("", "launch", *(PROVIDERS[name] for name in blocks)), rows
