"""The seeded defects: each can be made and undone, each is caught, and one that changes nothing is not."""

import dataclasses
import functools
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

from vitkernels.tools.verify.mutants import (
    MUTANTS,
    CompiledMutant,
    Mutant,
    MutantError,
    catch,
    check_mutants,
    mutant_checks,
    seeded_defect,
    seeding,
    shown_by,
    total,
)
from vitkernels.tools.verify.problems import WINDOW
from vitkernels.tools.verify.results import Result

PAGE = Path(__file__).parents[2] / "docs" / "mutants.md"
BY_NAME = {m.name: m for m in MUTANTS}
IN_SOURCE = [m for m in MUTANTS if isinstance(m, Mutant)]
IN_PTX = [m for m in MUTANTS if isinstance(m, CompiledMutant)]
KERNEL = BY_NAME["layer_norm: sum divided by the padded width"]
FUNCTION = BY_NAME["linear backward: no bias gradient"]
METHOD = BY_NAME["block backward: gradient through the first residual dropped"]


def code_of_all():
    """What every kernel of ops is, and the code of every function that a mutant edits."""
    kernels = {(module.__name__, name): id(value) for module, name, value in seeding.places_of_kernels()}
    return kernels, [code(m) for m in IN_SOURCE]


def code(mutant):
    module, _, path = mutant.where.partition(":")
    target = functools.reduce(getattr, path.split("."), importlib.import_module(f"vitkernels.{module}"))
    return inspect.unwrap(getattr(target, "fn", target)).__code__


def test_they_are_many_of_every_op_and_both_directions():
    assert len(BY_NAME) == len(MUTANTS) >= 44
    ops = {"layer_norm", "add_layer_norm", "rms_norm", "linear", "mlp", "swiglu_mlp", "attention", "attention_varlen",
           "window_attention", "relative_attention", "decomposed_attention", "patch_merging", "patch_embed", "block",
           "quantize_fp8", "layer_norm_fp8", "add_layer_norm_fp8", "linear_fp8", "lora_linear", "lora_mlp"}  # fmt: skip
    assert {m.op for m in MUTANTS} == ops
    assert {m.by for m in MUTANTS} == {"accuracy", "layouts", "memory", "nonfinite", "reach", "reruns"}
    assert sum("backward" in m.name for m in MUTANTS) >= 20
    # A name is part of a shell command that repeats the check.
    assert not [m.name for m in MUTANTS if set(m.name) & set("'/*?[]")]


def test_each_can_be_made_and_leaves_nothing_behind():
    before = code_of_all()
    for mutant in IN_SOURCE:
        with seeded_defect(mutant):
            assert code_of_all() != before, mutant.name
        assert code_of_all() == before, mutant.name


def test_an_exception_leaves_nothing_behind():
    before = code_of_all()
    for mutant in (KERNEL, FUNCTION, METHOD):
        with pytest.raises(ZeroDivisionError), seeded_defect(mutant):
            raise ZeroDivisionError
    assert code_of_all() == before


@pytest.mark.parametrize("mutant", [KERNEL, FUNCTION, METHOD], ids=lambda m: m.name)
def test_the_defect_is_gone_afterwards(mutant, device):
    assert catch(mutant, device, 0).status == "passed"
    assert catch(dataclasses.replace(mutant, new=mutant.old, case=WINDOW), device, 0).status == "skipped"


@pytest.mark.parametrize("what", sorted({m.name.partition(": ")[2] for m in IN_PTX}))
def test_each_edit_of_the_ptx_is_caught(what, device):
    mutant = next(m for m in IN_PTX if m.name.endswith(f": {what}"))
    result = catch(mutant, device, 1)
    assert result.status == "passed"
    # Beside the values it is the emulator that sees it.
    assert what == "a swizzle off by one" or f": the emulator: {mutant.kernel} on an emulated H100" in result.detail
    unedited = catch(dataclasses.replace(mutant, new=r"\g<0>"), device, 1)
    assert unedited.status == "skipped"
    assert unedited.detail.startswith("survived ")


def test_only_kernels_that_call_the_edited_function_are_made_anew():
    mutant = BY_NAME["layer_norm: lanes beyond the row not zeroed after centring"]  # in a function that kernels call
    before = {(module.__name__, name): value for module, name, value in seeding.places_of_kernels()}
    with seeded_defect(mutant):
        new = {
            key[1]
            for module, name, value in seeding.places_of_kernels()
            if value is not before[key := (module.__name__, name)]
        }
    assert {"_centre", "_layer_norm_fwd_kernel"} <= new
    assert not [name for name in new if "attention" in name or "product" in name]


@pytest.mark.parametrize("by", sorted({m.by for m in MUTANTS}))
def test_each_group_of_checks_catches_one(by, device):
    result = catch(next(m for m in MUTANTS if m.by == by), device, 1)
    assert result.status == "passed"
    assert result.detail.startswith(f"by {by}/")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"new": KERNEL.old}, "survived accuracy/layer_norm/10 tokens"),
        ({"old": "no such text"}, "occurs 0 times"),
        ({"old": "mask"}, "occurs"),
        ({"where": "ops._layer_norm.forward:_no_such_kernel"}, "does not exist"),
        ({"new": "mean = no_such_name"}, "cannot run"),
        ({"variant": "no such variant"}, "no problem is of its op and variant"),
    ],
    ids=lambda x: "" if isinstance(x, dict) else x,
)
def test_what_is_not_caught_does_not_count(change, words, device):
    bad = dataclasses.replace(KERNEL, name="bad", **change)
    *results, last = check_mutants(device, 0, [bad, KERNEL])
    assert [r.status for r in results] == ["skipped", "passed"]
    assert words in results[0].detail
    assert last.status == "broken"
    assert last.detail.startswith("1 of 2; bad: ")


def test_the_total_asks_for_95_percent():
    def of(caught, missed):
        results = [
            Result(f"mutants/{i}", "caught", "passed" if i < caught else "skipped") for i in range(caught + missed)
        ]
        return total([*results, Result("accuracy/x", "output 0", "failed")]).status

    assert of(19, 1) == of(20, 0) == "passed"
    assert of(18, 1) == of(0, 0) == "broken"


def test_a_mutant_that_cannot_be_made_is_an_error():
    with pytest.raises(MutantError, match="occurs 0 times"), seeded_defect(dataclasses.replace(KERNEL, old="nothing")):
        pass


def test_each_has_a_check_to_repeat_it_by(monkeypatch):
    """Beside a GPU, too: what the environment chooses is for the other checks."""
    monkeypatch.setenv("VITKERNELS_BACKEND", "auto")
    checks = list(mutant_checks(0))
    assert [c.id for c in checks] == [f"mutants/{m.name}" for m in MUTANTS]
    (result,) = checks[0].run()
    assert (result.check, result.status) == (checks[0].id, "passed")


def test_what_should_catch_them_is_what_a_quick_verification_runs():
    from vitkernels.tools.verify.run import Plan, checks

    ids = {c.id for c in checks(Plan())}
    for mutant in MUTANTS:
        assert any(f"{mutant.by}/{p.id}/{mutant.dtype}" in ids for p in shown_by(mutant)), mutant.name


def test_the_tests_that_the_page_names_exist():
    """``docs/make_mutants.py`` begins with them."""
    rows = re.findall(r"^\| (.+?) \|.*\| `(.+?)::(\w+)[^|]*` \|$", PAGE.read_text(encoding="utf-8"), re.M)
    assert len(rows) >= 44
    for name, file, test in rows:
        assert f"def {test}(" in (PAGE.parents[1] / "tests" / file).read_text(encoding="utf-8"), name


def test_a_triton_kernel_is_compiled_from_the_edited_source(device):
    from vitkernels import ops

    x = torch.ones(2, 40, device=device) * 3
    with seeded_defect(KERNEL):
        wrong = ops.layer_norm(x)
    assert ops.layer_norm(x).abs().max() == 0 < wrong.abs().max()
