"""What one block launches, and how long a GPU is estimated to take for it, against counts and sums done by hand."""

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="nothing compiles without Triton")
pytest.importorskip("timm")

from vitkernels.emulator.devices import RATES
from vitkernels.emulator.encode import Unsupported
from vitkernels.tools.aot import block_launches, block_time
from vitkernels.tools.aot.block import PHASES, Setting, events_of_block
from vitkernels.tools.aot.chips import CHIPS
from vitkernels.tools.aot.counts import Counts
from vitkernels.tools.aot.recorder import Event
from vitkernels.tools.cli import main

SMALL = "vit_tiny_patch16_224"
CONTRACT = block_launches.load()
PAGE = Path(__file__).parents[2] / "docs" / "compiler-report.md"


def numbers(*arguments, **options):
    return [len(events) for events in events_of_block(*arguments, **options).values()]


# Two norms, four products, attention, GELU, two sums of the residual. Backward: two products for each, and the sum for
# its bias; GELU, attention, two norms, two sums of gradients; the gradients of q, k and v are stacked and copied.
FORWARD, BACKWARD = 2 + 4 + 1 + 1 + 2, 4 * 3 + 1 + 1 + 2 + 2 + 2


def test_timms_block():
    assert numbers(SMALL, "timm", Setting(2)) == [FORWARD, FORWARD, BACKWARD]


def test_layer_scale():
    # Forward a product; backward a product for the input's gradient, another and a sum for the factors'.
    found = numbers("vit_small_patch14_dinov2", "timm", Setting(2))
    assert found == [FORWARD + 2, FORWARD + 2, BACKWARD + 2 * 3]


def test_autocast():
    # Casts: eight weights and biases, and the results of two norms. Backward the same, and the gradients of the two
    # branches.
    found = numbers(SMALL, "timm", Setting(2, autocast=True))
    assert found == [FORWARD + 10, FORWARD + 10, BACKWARD + 12]


def test_drop_path():
    # Random bits, their division by what is kept, and the product with the branch, for two branches.
    found = numbers(SMALL, "timm", Setting(2, drop_path=0.1))
    assert found == [FORWARD, FORWARD + 2 * 3, BACKWARD + 2]


def test_an_accelerated_block():
    """It launches fewer; the registered ops are looked into, and empty tensors are no launches."""
    found = events_of_block(SMALL, "vitkernels", Setting(2))
    assert len(found["inference"]) < FORWARD
    events = [event for events in found.values() for event in events]
    assert any(event.call for event in events)
    assert not any("vitkernels" in event.op for event in events)
    assert all(event.call or any(a.written and a.elements for a in event.accesses) for event in events)


@pytest.mark.parametrize("model", CONTRACT)
def test_the_contract(model, tmp_path, capsys):
    code = main(["inspect", "--launches", model, "--json", str(tmp_path / "found.json")])
    said = capsys.readouterr().out
    assert code == 0, said
    found = json.loads((tmp_path / "found.json").read_text())
    ours = found["launches"]["bf16"]["vitkernels"]
    assert {phase: len(ops) for phase, ops in ours.items()}.items() <= CONTRACT[model]["launches"]["bf16"].items() or (
        "Better (--update takes it over)" in said
    )
    assert "goal" in said
    # What the docs say is what the contract holds.
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if "| accelerated |" in line]
    for setting, known in CONTRACT[model]["launches"].items():
        row = f"| {setting} | accelerated | {' | '.join(str(known[phase]) for phase in PHASES)} |"
        assert row in rows, "run python docs/make_block_reports.py"


def test_a_contract_that_lies_elsewhere(tmp_path, monkeypatch, capsys):
    """Broken by a launch more, better by one less; written on update alone, and a worse one only if it is accepted."""
    monkeypatch.setattr(block_launches, "count_launches", lambda model, batch: counted)
    path = tmp_path / "launches.json"

    def launches(backward):
        event = Event("forward", "mm", [])
        return {"bf16": {"vitkernels": dict(zip(PHASES, ([event], [event], [event] * backward), strict=True))}}

    def run(**options):
        return block_launches.run_launches(SMALL, batch=2, path=path, **options)[0], capsys.readouterr().out

    counted = launches(3)
    held, said = run()
    assert held
    assert "The contract does not hold this model; --update takes it in." in said
    assert not path.exists()
    assert run(update_contract=True)[0]
    known = path.read_text()
    counted = launches(4)
    held, said = run()
    assert not held
    assert "Broken: bf16, training, backward: 3 → 4 launches" in said
    assert not run(update_contract=True)[0]
    assert path.read_text() == known
    counted = launches(2)
    held, said = run()
    assert held
    assert "Better (--update takes it over): bf16, training, backward: 3 → 2 launches" in said
    assert run(update_contract=True)[0]
    assert json.loads(path.read_text())[SMALL]["launches"]["bf16"]["training, backward"] == 2
    counted = launches(4)
    assert run(update_contract=True, accept_worse=True)[0]
    assert json.loads(path.read_text())[SMALL]["launches"]["bf16"]["training, backward"] == 4


def test_a_contract_of_another_form(tmp_path, capsys):
    path = tmp_path / "launches.json"
    path.write_text('{"vit": {"batch": 2}}')
    with pytest.raises(ValueError, match="vit must hold batch, goals and launches; got batch"):
        block_launches.load(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--launches", "resnet18"], "ResNet has no blocks; expected a Vision Transformer of timm"),
        (["--launches", "efficientnet_b0"], "EfficientNet has blocks of convolutions; expected a Vision Transformer"),
        (["--time", "resnet18"], "ResNet has no blocks; expected a Vision Transformer of timm"),
        (["--time", "vit_of_nobody"], "'vit_of_nobody' is neither a model of timm nor a folder"),
        (["--time", SMALL, "--batch", "0"], "batch is 0; expected 1 or more"),
        (["--launches", SMALL, "--batch", "-1"], "batch is -1; expected 1 or more"),
        (["--launches", SMALL, "--time", SMALL], "are two reports: ask for one at a time"),
        (["--time", SMALL, "--update"], "--update is not for --time"),
        (["--batch", "2"], "--batch is for --launches and --time"),
        (["--launches", SMALL, "--gpu", "H100"], "--gpu is for --time"),
        (["--launches", "vit_base_patch16_224", "--batch", "2", "--update"], "--update got batch 2"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert main(["inspect", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


H100 = CHIPS["H100"]


def test_a_product_of_pytorch():
    found = block_time.estimate(Event("forward", "mm", [], flops=10**12), H100, None)
    assert found.terms["tensor"] == pytest.approx(1e12 / 790e12 * 1e6)
    assert found.us == pytest.approx(found.terms["tensor"] + found.terms["launch"])
    assert found.by == "tensor"


def test_attention_of_pytorch():
    event = Event("forward", "_scaled_dot_product_flash_attention", [], flops=10**12, attended=(512, 512))
    assert block_time.estimate(event, H100, None).terms["tensor"] == pytest.approx(1e6 / 282)
    # 197 queries and keys take two blocks of 128 each.
    short = block_time.estimate(Event(event.phase, event.op, [], 10**12, attended=(197, 197)), H100, None)
    assert short.terms["tensor"] == pytest.approx(1e6 / 282 * (256 / 197) ** 2)
    # Halfway between the logarithms of 512 and 16,384 lies 2,896; 2,944 is the next whole block.
    back = block_time.estimate(Event("backward", event.op, [], 10**12, attended=(2944, 2944)), H100, None)
    rate = 198 + (291 - 198) * math.log(2944 / 512) / math.log(16384 / 512)
    assert back.terms["tensor"] == pytest.approx(1e6 / rate)


def counts(grid):
    return Counts(
        kernel="_kernel", target="sm_90", grid=grid, programs=1, tensor=0, fma=10**6, alu=10**6, mufu=10**6, lsu=0,
        issue=10**7, flops={"wgmma bf16": 10**11}, requests=0, sectors=0, excess_sectors=0, wavefronts=10**6,
        conflicts=0, l2_bytes=10**9, l2_least=0, dram_bytes=10**8, barriers=0, operands=2 * 10**6,
    )  # fmt: skip


@pytest.mark.parametrize("programs", [1, 40])
def test_a_kernel_of_ours(programs):
    """The longest term, a share of the others by the pieces of a multiprocessor's work, and the launch."""
    found = block_time.estimate(Event("forward", "_kernel", []), H100, counts(132 * programs))
    terms = dict(found.terms)
    launch = terms.pop("launch")
    assert terms["tensor"] == pytest.approx(1e11 / 790e12 * 1e6)
    assert terms["L2"] == pytest.approx(1e9 / (RATES["sm_90"].l2 * 1.98e9) * 1e6)
    assert terms["DRAM"] == pytest.approx(1e8 / (3.35e12 * 4.3 / 4.8) * 1e6)
    assert terms["issue"] == pytest.approx(1e7 / 132 / 4 / 1.98e3)
    assert terms["special"] == pytest.approx(1e6 / 132 * 2 / 1.98e3)
    # Accesses and wgmma's operands share the 128 bytes a clock.
    assert terms["shared"] == pytest.approx(3e6 / 132 / 1.98e3)
    longest = max(terms.values())
    # A persistent program moves its bytes through shared memory of 227 KiB, piece by piece.
    pieces = max(programs, 1e9 / 132 / (227 << 10))
    assert 30 < pieces <= 40
    assert found.us == pytest.approx(longest + (sum(terms.values()) - longest) / pieces + launch)


def test_a_kernel_that_cannot_be_run(monkeypatch, capsys):
    def fails(call, target):
        raise Unsupported("_kernel, PTX line 7: tcgen05.mma: instruction is not implemented")

    monkeypatch.setattr(block_time, "count", fails)
    assert main(["inspect", "--time", SMALL, "--batch", "2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "cannot be run on an emulated sm_80: _kernel, PTX line 7: tcgen05.mma" in line


def test_the_estimate(tmp_path, capsys):
    code = main(["inspect", "--time", SMALL, "--batch", "2", "--gpu", "A100", "--json", str(tmp_path / "time.json")])
    said = capsys.readouterr().out
    assert code == 0
    found = json.loads((tmp_path / "time.json").read_text())
    assert found["estimate"] is True
    assert found["blocks"].keys() == CHIPS.keys()
    for gpu, blocks in found["blocks"].items():
        assert f"\n{gpu}  " in said
        for provider, block in blocks.items():
            assert (block["host_us"] is None) == (provider == "torch.compile")
            for phase in PHASES:
                assert block[phase]
                for launch in block[phase]:
                    assert launch["estimate_us"] >= max(launch["terms_us"].values())
                    assert launch["by"] in (*block_time.TERMS, "launch")
    # Faster memory makes nothing slower, and only counted terms come from the emulated GPU.
    h100, h200 = (found["blocks"][gpu]["vitkernels"] for gpu in ("H100", "H200"))
    for phase in PHASES:
        assert all(b["estimate_us"] <= a["estimate_us"] for a, b in zip(h100[phase], h200[phase], strict=True))
        assert all((launch["from"] == "emulated sm_90") == launch["op"].endswith("_kernel") for launch in h100[phase])
    # No table of times without the word.
    for title in [line for line in said.splitlines() if "µs" in line and line.endswith(("bf16.", "A100", ":"))]:
        assert "stimate" in title
