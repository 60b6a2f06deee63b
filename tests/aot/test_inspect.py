"""``vitkernels inspect`` as it is called: the contract at two real cases, what it writes, and what it exits with."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="nothing compiles without Triton")

from vitkernels.aot import inspect
from vitkernels.cli import main
from vitkernels.console import UserError

ROOT = Path(__file__).parents[2]
CASES = (
    "vit_tiny_patch16_224",  # attention in windows, and with frozen queries
    "vit_base_patch16_224",  # in fp32 and fp64 too
    "deit3_base_patch16_224",
    "vit_so400m_patch14_siglip_378",
    "eva02_large_patch14_448",  # separate SwiGLU with a norm
    "aimv2_large_patch14_224",  # without
)
COMMAND = "import sys; from vitkernels.cli import main; sys.exit(main(sys.argv[1:]))"
# The library's inspect on contracts that lie elsewhere.
ELSEWHERE = """
import json, sys
from pathlib import Path
from vitkernels.aot.inspect import inspect
options = json.loads(sys.argv[2])
sys.exit(0 if inspect(["sm_90"], kernel="_layer_norm_fwd", cases=["vit_tiny_patch16_224"], folder=Path(sys.argv[1]),
                      **options) else 1)
"""


def run(*arguments, interpreted=False):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, "-c", *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.timeout(900)
def test_the_contract_on_sm_90(tmp_path):
    """Every kernel of the library is compiled, and holds the contract."""
    options = [f for case in CASES for f in ("--case", case)]
    found = run(COMMAND, "inspect", *options, "--json", tmp_path / "found.json")
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-5000:]
    rows = json.loads((tmp_path / "found.json").read_text())
    sources = "".join(file.read_text() for file in (ROOT / "vitkernels/ops").rglob("*.py"))
    kernels = set(re.findall(r"^def (_\w+_kernel)\(", sources, re.M))
    assert {row["kernel"] for row in rows} == kernels
    assert all(kernel in found.stdout for kernel in kernels)
    assert {use.split()[0] for row in rows for use in row["uses"]} == {*CASES}
    # A launch that several uses share is compiled once.
    assert sum(len(row["uses"]) for row in rows) > len(rows)
    # In fp64, for gradients to be checked in, all compile but those that are for 16 bits alone.
    in_fp64 = [row for row in rows if row["uses"][0].endswith(" fp64")]
    sixteen_bits = r"glu_product|attention_(fwd|bwd)_(row|windows)|bwd_delta|activation_bwd"
    assert {row["kernel"] for row in in_fp64} >= {k for k in kernels if not re.search(sixteen_bits, k)}
    assert not [row for row in rows if "error" in row]
    rows = [row for row in rows if row not in in_fp64]
    bf16_products = [row for row in rows if row["wgmma"]]
    assert {row["kernel"] for row in bf16_products} == {k for k in kernels if re.search(
        r"product|attention_(fwd|bwd_(dkv|dq|dmask|row|windows))|patch_embed", k)}  # fmt: skip
    assert all(row["spilled_bytes"] == row["slow_products"] == 0 < row["registers"] <= 255 for row in rows)
    # The 32 channels of a window's head are fewer rows than wgmma takes.
    assert {row["kernel"] for row in rows if row["mma_sync"]} == {"_attention_bwd_windows_kernel"}


def test_exit_codes(tmp_path):
    """1 for a figure that got worse, 0 once it is taken over; the contract is written on --update alone."""

    def inspect_elsewhere(**options):
        return run(ELSEWHERE, tmp_path, json.dumps(options))

    missing = inspect_elsewhere()
    assert missing.returncode == 1, missing.stderr
    assert "Broken: sm_90 _layer_norm_fwd_kernel vit_tiny_patch16_224 layer_norm bf16 is not in the contract" in (
        missing.stdout
    )
    assert not list(tmp_path.iterdir())
    assert inspect_elsewhere(update=True).returncode == 0
    path = tmp_path / "sm_90.json"
    known = path.read_text()
    assert inspect_elsewhere().returncode == 0
    registers = re.search(r'"registers": (\d+)', known)[1]
    path.write_text(known.replace(f'"registers": {registers}', '"registers": 8'))
    worse = inspect_elsewhere()
    assert worse.returncode == 1
    assert f"registers 8 → {registers}" in worse.stdout
    assert inspect_elsewhere(update=True).returncode == 1
    path.write_text(known.replace(f'"registers": {registers}', '"registers": 200'))
    better = inspect_elsewhere()
    assert better.returncode == 0
    assert "Better (`vitkernels inspect --update` takes it over): sm_90" in better.stdout
    assert f"registers 200 → {registers}" in better.stdout
    assert inspect_elsewhere(update=True).returncode == 0
    assert path.read_text() == known


def test_dump_and_markdown(tmp_path):
    options = ("--kernel", "delta", "--case", "vit_tiny_patch16_224", "--dump", tmp_path, "--markdown")
    done = run(COMMAND, "inspect", "--target", "sm_90", "--target", "gfx942", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    for target, stages in {"sm_90": ("ttir", "ttgir", "ptx", "cubin", "sass"), "gfx942": ("ttgir", "amdgcn")}.items():
        folder = tmp_path / target / "_attention_bwd_delta_kernel"
        assert all(
            place.name.startswith("vit_tiny_patch16_224-attention_frozen_queries-bf16-") for place in folder.iterdir()
        )
        for stage in stages:
            assert next(iter(folder.glob(f"*/*.{stage}"))).stat().st_size > 500
    assert done.stdout.count("| _attention_bwd_delta_kernel | ") == 2
    assert done.stdout.count("| kernel | launches | registers |") == 2


def test_what_the_user_can_put_right(monkeypatch, tmp_path, capsys):
    for argv in (["inspect", "--target", "sm_70"], ["inspect", "--nothing"]):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2
    assert main(["inspect", "--accept-worse"]) == 2
    assert "--accept-worse is for --update" in capsys.readouterr().err
    interpreted = run(COMMAND, "inspect", interpreted=True)
    assert interpreted.returncode == 2
    assert "unset TRITON_INTERPRET" in interpreted.stderr
    monkeypatch.setattr(inspect, "INTERPRETED", False)
    with pytest.raises(UserError, match="--jobs is 0; expected 1 or more"):
        inspect.inspect(["sm_90"], jobs=0)
    with pytest.raises(UserError, match="no case vit_nothing; there are vit_tiny_patch16_224"):
        inspect.inspect(["sm_90"], cases=["vit_nothing"])
    no_kernel = run(COMMAND, "inspect", "--kernel", "nothing", "--case", "vit_tiny_patch16_224")
    assert no_kernel.returncode == 2
    assert "no kernel's name holds 'nothing'" in no_kernel.stderr
    unwritable = run(COMMAND, "inspect", "--kernel", "delta", "--case", "vit_tiny_patch16_224",
                     "--json", tmp_path / "missing" / "found.json")  # fmt: skip
    assert unwritable.returncode == 2
    assert "cannot write" in unwritable.stderr


# Every dtype that an op takes beside the one that it multiplies in.
MIXED = """
import sys
import torch
from vitkernels import ops
from vitkernels.aot.build import compile_launch, trace
from vitkernels.ops._registry import OPS


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
    OPS["attention_qkvpacked_bwd"].launcher(o, qkv, o, lse, 0.2, False, mask.is_floating_point(), mask)


half, single, double = torch.bfloat16, torch.float32, torch.float64
embeddings = [(torch.uint8, double), (half, double), (half, single), (double, half)]
masks = [(torch.bool, double), (half, double), (double, half), (single, half)]
cases = [lambda i=i, w=w: embed(i, w) for i, w in embeddings]
cases += [lambda m=m, d=d: attend(m, d, 1, 2, 300, 300) for m, d in masks]
cases += [lambda: attend(half, double, 2, 1, 1, 300)]
for launch in dict.fromkeys(launch for case in cases for launch in trace(case, sys.argv[1])):
    compile_launch(launch)
print("compiled")
"""


@pytest.mark.timeout(900)
def test_other_dtypes_beside_those_of_products_compile():
    found = run(MIXED, "sm_80")
    assert found.stdout == "compiled\n", found.stderr[-5000:]
