"""``vitkernels inspect`` as it is called: the contract at a real case, what it writes, and what it exits with."""

import functools
import json
import re
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="nothing compiles without Triton")

from vitkernels.ops._registry import OPS
from vitkernels.testing.cases import CASES
from vitkernels.tools.aot import compile_launch, inspect, trace
from vitkernels.tools.aot.inspect import find_launches
from vitkernels.tools.cli import main
from vitkernels.tools.console import UserError

ROOT = Path(__file__).parents[2]
CASE = "vit_tiny_patch16_224"  # attention in windows, and with frozen queries


@pytest.fixture
def run(capsys):
    """Calls the command, in this process and one kernel at a time."""

    def call(*arguments):
        code = main(["inspect", *map(str, arguments), "--jobs", "1"])
        return types.SimpleNamespace(returncode=code, **capsys.readouterr()._asdict())

    return call


def test_every_kernel_is_looked_at():
    """In 16 bits, and, for gradients to be checked in, in fp64, but for those that are for 16 bits alone."""
    sources = "".join(file.read_text() for file in (ROOT / "vitkernels/ops").rglob("*.py"))
    kernels = set(re.findall(r"^def (_\w+_kernel)\(", sources, re.M))
    uses = find_launches(["sm_90"], CASES)
    assert {launch.name for launch in uses} == kernels
    # A launch that several uses share is compiled once.
    assert sum(map(len, uses.values())) > len(uses)
    in_fp64 = {launch.name for launch, of in uses.items() if of[0][2] == "fp64"}
    sixteen_bits = r"glu_product|hopper|attention_(fwd|bwd)_(row|windows|whole)|bwd_delta|activation_bwd|fp8|cast"
    # Nor has the case that is compiled in fp64 a LayerScale.
    assert in_fp64 >= {k for k in kernels if not re.search(sixteen_bits + "|layer_scale", k)}


def test_the_contract_of_a_case(tmp_path, run):
    found = run("--case", CASE, "--kernel", "attention", "--json", tmp_path / "found.json")
    assert found.returncode == 0, found.out[-5000:] + found.err[-5000:]
    rows = json.loads((tmp_path / "found.json").read_text())
    assert all(row["kernel"] in found.out for row in rows)
    assert not [row for row in rows if "error" in row]
    assert all(row["spilled_bytes"] == row["slow_products"] == 0 < row["registers"] <= 255 for row in rows)
    assert {row["kernel"] for row in rows if not row["wgmma"]} == {"_attention_bwd_delta_kernel"}
    # The 32 channels of a window's head are fewer rows than wgmma takes.
    assert {row["kernel"] for row in rows if row["mma_sync"]} == {"_attention_bwd_windows_kernel"}


def test_a_contract_that_lies_elsewhere(tmp_path, capsys):
    """Broken by a figure that got worse, held once it is taken over; it is written on --update alone."""

    def holds(**options):
        options |= {"kernel": "_layer_norm_fwd", "cases": [CASE], "folder": tmp_path, "jobs": 1}
        return inspect.inspect(["sm_90"], **options), capsys.readouterr().out

    held, said = holds()
    assert not held
    assert "Broken: sm_90 _layer_norm_fwd_kernel vit_tiny_patch16_224 layer_norm bf16 is not in the contract" in said
    assert not list(tmp_path.iterdir())
    assert holds(update=True)[0]
    path = tmp_path / "sm_90.json"
    known = path.read_text()
    assert holds()[0]
    registers = re.search(r'"registers": (\d+)', known)[1]
    path.write_text(known.replace(f'"registers": {registers}', '"registers": 8'))
    held, said = holds()
    assert not held
    assert f"registers 8 → {registers}" in said
    assert not holds(update=True)[0]
    path.write_text(known.replace(f'"registers": {registers}', '"registers": 200'))
    held, said = holds()
    assert held
    assert "Better (`vitkernels inspect --update` takes it over): sm_90" in said
    assert f"registers 200 → {registers}" in said
    assert holds(update=True)[0]
    assert path.read_text() == known


@pytest.mark.parametrize(("held", "code"), [(True, 0), (False, 1)])
def test_exit_codes(held, code, run, monkeypatch):
    monkeypatch.setattr(inspect, "inspect", lambda *args, **kwargs: held)
    assert run().returncode == code


def test_run(tmp_path, capsys):
    """Counts go into the contract with --run --update, stay there without, and fail where they are worse."""

    def holds(**options):
        options |= {"kernel": "_layer_norm_fwd", "cases": [CASE], "folder": tmp_path, "jobs": 1}
        return inspect.inspect(["sm_90"], **options), capsys.readouterr().out

    assert holds(update=True)[0]
    path = tmp_path / "sm_90.json"
    assert "fma" not in path.read_text()
    held, said = holds(run=True)
    assert not held
    assert "has no counts in the contract: `vitkernels inspect --run --update` takes them in" in said
    assert holds(run=True, update=True)[0]
    known = path.read_text()
    (fma, barriers) = (re.search(rf'"{figure}": (\d+)', known)[1] for figure in ("fma", "barriers"))
    assert int(fma) > 0 < int(barriers)
    path.write_text(known.replace(f'"fma": {fma}', '"fma": 7'))
    assert holds(update=True)[0]
    assert '"fma": 7' in path.read_text()
    held, said = holds(run=True)
    assert not held
    assert f"fma 7 → {fma}" in said
    path.write_text(known)
    held, said = holds(run=True, markdown=True, json_file=tmp_path / "found.json")
    assert held
    assert "Microseconds on one H100 at the least" in said
    assert said.count("\n| _layer_norm_fwd_kernel | ") == 3  # what it compiles to, executes, and takes
    rows = [row for row in json.loads((tmp_path / "found.json").read_text()) if "run" in row]
    first = [row["run"] for row in rows if row["uses"] == ["vit_tiny_patch16_224 add_layer_norm bf16"]]
    assert sum(each["fma"] for each in first) == int(fma)
    assert all(row["run"]["bound_us"] >= row["run"]["times_us"]["dram"] > 0 for row in rows)


def test_targets_that_cannot_run():
    with pytest.raises(UserError, match=r"cannot run sm_100, gfx942: .* emulated are sm_80, sm_90, sm_120$"):
        inspect.inspect(["sm_90", "sm_100", "gfx942"], run=True)


def test_dump_and_markdown(tmp_path, run):
    options = ("--kernel", "delta", "--case", CASE, "--dump", tmp_path, "--markdown")
    done = run("--target", "sm_90", "--target", "gfx942", *options)
    assert done.returncode == 0, done.out + done.err
    for target, stages in {"sm_90": ("ttir", "ttgir", "ptx", "cubin", "sass"), "gfx942": ("ttgir", "amdgcn")}.items():
        folder = tmp_path / target / "_attention_bwd_delta_kernel"
        assert all(
            place.name.startswith("vit_tiny_patch16_224-attention_frozen_queries-bf16-") for place in folder.iterdir()
        )
        for stage in stages:
            assert next(iter(folder.glob(f"*/*.{stage}"))).stat().st_size > 500
    assert done.out.count("| _attention_bwd_delta_kernel | ") == 2
    assert done.out.count("| kernel | launches | registers |") == 2


def test_what_the_user_can_put_right(tmp_path, run, capsys):
    for argv in (["inspect", "--target", "sm_70"], ["inspect", "--nothing"]):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2
    assert main(["inspect", "--accept-worse"]) == 2
    assert "--accept-worse is for --update" in capsys.readouterr().err
    with pytest.raises(UserError, match="--jobs is 0; expected 1 or more"):
        inspect.inspect(["sm_90"], jobs=0)
    with pytest.raises(UserError, match="no case vit_nothing; there are vit_tiny_patch16_224"):
        inspect.inspect(["sm_90"], cases=["vit_nothing"])
    no_kernel = run("--kernel", "nothing", "--case", CASE)
    assert no_kernel.returncode == 2
    assert "no kernel's name holds 'nothing'" in no_kernel.err
    unwritable = run("--kernel", "delta", "--case", CASE, "--json", tmp_path / "missing" / "found.json")
    assert unwritable.returncode == 2
    assert "cannot write" in unwritable.err


def new(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="cuda")


def embed(images, weight):
    images, weight = new(2, 3, 64, 64, dtype=images), new(64, 3, 16, 16, dtype=weight)
    constants = None if images.is_floating_point() else [0.5] * 3 + [0.25] * 3
    out = OPS["patch_embed_fwd"].launcher(images, weight, None, None, None, True, constants, weight.dtype)
    OPS["patch_embed_bwd"].launcher(out, images, weight, images.is_floating_point(), True, constants)


def attend(mask, dtype, *shape):
    qkv, mask = new(2, 300, 3, 2, 32, dtype=dtype), new(*shape, dtype=mask)
    o, lse = OPS["attention_qkvpacked_fwd"].launcher(qkv, 0.2, mask)
    OPS["attention_qkvpacked_bwd"].launcher(o, qkv, o, lse, 0.2, None, mask.is_floating_point(), mask)


def test_other_dtypes_beside_those_of_products_compile():
    """Every dtype that an op takes beside the one that it multiplies in."""
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    cases = [functools.partial(embed, *dtypes) for dtypes in ((torch.uint8, double), (half, single), (double, half))]
    cases += [
        functools.partial(attend, mask, dtype, 1, 2, 300, 300)
        for mask, dtype in ((torch.bool, double), (half, double), (double, half))
    ]
    for launch in dict.fromkeys(launch for case in cases for launch in trace(case, "sm_80")):
        compile_launch(launch)
