"""``vitkernels verify``: what it runs, what it says, and the exit code that a CI sees."""

import json
import os
import shlex
import subprocess
import sys

import pytest
import torch

from vitkernels.ops._attention.config import choose_config as attention_config
from vitkernels.ops._product_config import choose_config as product_config
from vitkernels.runtime import DeviceFacts
from vitkernels.tools import cli
from vitkernels.tools.verify import mutants, run
from vitkernels.tools.verify.problems import LARGE
from vitkernels.tools.verify.results import Check, Result, Verification
from vitkernels.tools.verify.run import Plan, checks, compared

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="asks for an emulated GPU")

NORM = "accuracy/layer_norm/10 tokens of 40 channels/fp32"


def verification(*statuses: str, group: str = "accuracy") -> Verification:
    return Verification({}, "vitkernels verify", [Result(f"{group}/x", "output", s) for s in statuses])


@pytest.mark.parametrize(
    ("statuses", "group", "code"),
    [
        (("passed", "skipped"), "accuracy", 0),
        (("passed", "failed", "broken"), "accuracy", 1),
        (("passed", "broken"), "accuracy", 2),
        (("skipped",), "accuracy", 3),
        ((), "accuracy", 3),
        (("passed",), "mutants", 3),
    ],
)
def test_exit_codes(statuses, group, code):
    assert verification(*statuses, group=group).exit_code == code


def test_a_pattern_is_a_whole_id_a_shell_pattern_or_a_beginning():
    check = Check("accuracy/mlp/recompute/fp32", list)
    assert check.matches(["accuracy"]) and check.matches(["accuracy/mlp/"]) and check.matches(["*/fp32"])
    assert check.matches([check.id]) and not check.matches(["accuracy/ml"]) and not check.matches(["mlp"])


def test_ids_are_distinct_and_both_levels_look_at_every_group():
    quick, full = ([c.id for c in checks(Plan(full=full))] for full in (False, True))
    for ids in (quick, full):
        assert len(set(ids)) == len(ids)
        assert {id.partition("/")[0] for id in ids} == {
            "compiled", "integration", "mutants", "accuracy", "layouts", "memory", "reach", "reruns",
            "nonfinite",
        }  # fmt: skip
    # Beside the named models, at which the quick level compiles for one target.
    assert set(quick) <= set(full)


def test_full_compares_the_tokens_and_head_dims_of_vision_transformers():
    cases = {problem.case for problem, _ in compared(Plan(full=True))}
    assert {1, 49, 50, 197, 257, 577, 729, 1025, 1374} <= {case.tokens for case in cases}
    assert {16, 24, 32, 36, 48, 60, 64, 72, 80, 88, 96, 104, 112, 128} <= {case.head_dim for case in cases}
    assert {2730, 4304} <= {case.hidden for case in cases}


def test_a_gpu_also_runs_what_is_too_large_to_emulate():
    """The kernels in Gluon: attention of long rows, and products of as many tiles as a GPU has multiprocessors."""
    h100 = DeviceFacts("h100", "sm_90", 132, 227 << 10)
    B, N, C, F, D = LARGE.batch, LARGE.tokens, LARGE.channels, LARGE.hidden, LARGE.head_dim
    half = torch.bfloat16
    for K, width, kind in ((C, F, "epilogue"), (F, C, "epilogue"), (C, F, "dact")):
        config = product_config(B * N, width, K, half, kind=kind, facts=h100, tma=True)
        assert (config.provider, config.block_n) == ("gluon", 256 if K == F else 128)
    assert attention_config(N, N, D, half, h100, heads=B * LARGE.heads, tma=True).forward.regime == "hopper"
    for full in (False, True):
        on_gpu, on_cpu = (Plan(full=full, device=torch.device(kind)) for kind in ("cuda", "cpu"))
        large = [problem.id for problem, _ in compared(on_gpu) if problem.case is LARGE]
        assert {id.partition("/")[0] for id in large} >= {"mlp", "linear", "attention", "block"}
        assert not any(problem.case is LARGE for problem, _ in compared(on_cpu))
        assert any(LARGE.name in c.id and c.id.startswith("reruns") for c in checks(on_gpu))


def test_the_command_passes_and_writes_what_it_found(tmp_path, capsys):
    paths = {form: tmp_path / f"found.{form}" for form in ("json", "junit", "html")}
    options = [word for form, path in paths.items() for word in (f"--{form}", str(path))]
    assert cli.main(["verify", "--cpu", "--only", NORM, *options]) == 0
    out = capsys.readouterr().out
    assert "layer_norm" in out and out.splitlines()[-1] == "Passed."
    found = json.loads(paths["json"].read_text())
    assert [r["name"] for r in found["results"]] == ["output 0", "dx", "dweight", "dbias"]
    assert found["command"] == f"vitkernels verify --quick --cpu --only '{NORM}'"
    assert all(path.stat().st_size for path in paths.values())


def test_a_defect_fails_the_command_and_is_reproduced_by_what_it_says(capsys):
    mutant = next(m for m in mutants.MUTANTS if m.op == "layer_norm" and m.by == "accuracy" and m.variant is None)
    with mutants.seeded_defect(mutant):
        assert cli.main(["verify", "--cpu", "--only", "accuracy/layer_norm", "--dtype", "fp32"]) == 1
        out = capsys.readouterr().out
        said = next(line.strip() for line in out.splitlines() if line.strip().startswith("vitkernels verify"))
        pattern = shlex.split(said)[-1]
        assert pattern.startswith("accuracy/layer_norm/")
        assert cli.main(["verify", "--cpu", "--only", pattern]) == 1
    assert cli.main(["verify", "--cpu", "--only", pattern]) == 0


def test_a_self_test_that_sees_nothing_makes_the_run_invalid(monkeypatch, capsys):
    blind = [Check(f"mutants/{i}", lambda i=i: [Result(f"mutants/{i}", "caught", "skipped", "survived")]) for i in "ab"]
    monkeypatch.setattr(mutants, "mutant_checks", lambda seed: iter(blind))
    assert cli.main(["verify", "--cpu", "--only", "mutants", "--only", NORM]) == 2
    assert "0 of 2" in capsys.readouterr().out


def test_a_check_that_raises_is_a_failure_and_an_empty_one_is_broken():
    def raises():
        raise RuntimeError("launch failed")

    found = run.run_all([Check("a/b", raises)], torch.device("cpu")) + run.run_all(
        [Check("a/c", list)], torch.device("cpu")
    )
    assert [(r.check, r.status) for r in found] == [("a/b", "failed"), ("a/c", "broken")]
    assert "RuntimeError: launch failed" in found[0].detail


def test_results_come_in_the_order_of_the_checks():
    made = [Check(f"a/{i}", lambda i=i: [Result(f"a/{i}", str(i), "passed")]) for i in range(9)]
    assert [r.name for r in run.run_all(made, torch.device("cpu"))] == [str(i) for i in range(9)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--only", "acuracy"), "no check is of that name; there are accuracy"),
        (("--model", "timm/vit_tiny_patch16_225"), "vit_tiny_patch16_224"),
        (("--only", NORM, "--json", "missing_folder/found.json"), "missing_folder"),
    ],
)
def test_mistakes_are_one_line(arguments, says, capsys):
    assert cli.main(["verify", "--cpu", *arguments]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("vitkernels: ") and says in err


def test_numpy_multiplies_with_one_thread_in_each_worker():
    """With a thread a core in each of as many workers, products take more than twice as long."""
    code = (
        "from vitkernels.tools.cli import main; main(['verify', '--cpu', '--only', 'no such check']); "
        "import threadpoolctl; "
        "print([pool['num_threads'] for pool in threadpoolctl.threadpool_info() if 'openblas' in pool['filepath']])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert set(json.loads(found.stdout)) == {1}
