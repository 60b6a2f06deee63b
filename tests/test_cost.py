"""docs/cost.md is what its script writes, and the model behind it keeps to what must hold of any."""

import importlib.util
import math
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the blocks' times are of vitkernels inspect")
timm = pytest.importorskip("timm")

DOCS = Path(__file__).parents[1] / "docs"
spec = importlib.util.spec_from_file_location("make_cost", DOCS / "make_cost.py")
make_cost = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = make_cost  # dataclasses look there
spec.loader.exec_module(make_cost)

PAGE = make_cost.PAGE.read_text(encoding="utf-8")
TIMES = make_cost.read_times(PAGE)


@pytest.fixture(scope="module", params=make_cost.MODELS)
def model(request):
    return make_cost.describe(*make_cost.MODELS[request.param], TIMES[request.param])


def test_page_is_what_the_script_writes():
    assert TIMES.keys() == make_cost.MODELS.keys()
    assert make_cost.page(TIMES) == PAGE, "run python docs/make_cost.py, or with --keep where no kernel changed"


def test_every_table_is_called_an_estimate():
    assert PAGE.startswith("# Cost on paper\n\n**Every figure here is an estimate; nothing was timed")
    for heading in re.findall(r"^## (.+)$", PAGE, re.M):
        assert "stimated" in heading or heading == "Assumptions"


def test_blocks_are_those_of_inspect():
    """The other page that holds the estimates of ``vitkernels inspect --time``, to its whole µs."""
    report = (DOCS / "compiler-report.md").read_text(encoding="utf-8")
    table = report[report.index("Estimated µs, vit_base_patch16_224, batch 256") :]
    row = re.search(r"^\| H100 \| accelerated \| (\d+) \| [\d.]+ \| (\d+) \| (\d+) \|", table, re.M)
    assert make_cost.MODELS["ViT-B/16"] == ("vit_base_patch16_224", 256)
    assert all(abs(ours - int(theirs)) <= 0.55 for ours, theirs in zip(TIMES["ViT-B/16"], row.groups(), strict=True))


def test_one_gpu_computes_its_blocks_and_the_rest(model):
    us, exposed = make_cost.training_us(model, 1)
    assert exposed == 0
    rest = make_cost.outside(model, training=True) + make_cost.update(model, 1)
    assert us == pytest.approx(model.depth * (model.forward + model.backward) + rest)
    assert rest < 0.25 * us, "the blocks are most of it"
    assert make_cost.inference_us(model) >= model.depth * model.inference


def test_never_faster_than_linear_but_for_the_optimizers_shards(model):
    one = make_cost.training_us(model, 1)[0]
    steps = [make_cost.training_us(model, n)[0] for n in make_cost.GPUS]
    saved = [make_cost.update(model, 1) - make_cost.update(model, n) for n in make_cost.GPUS]
    assert all(step >= one - less for step, less in zip(steps, saved, strict=True))
    exposed = [make_cost.training_us(model, n)[1] for n in make_cost.GPUS]
    assert exposed == sorted(exposed) and exposed[1] > 0


def test_collective_by_hand():
    assert make_cost.collective(1e9, 1) == 0
    # Eight GPUs, Simple: 7 steps within the node, and 7/8 of a gigabyte at 360 GB/s.
    assert make_cost.collective(1e9, 8) == pytest.approx(8.4 + 7 * 3.4 + 1e9 * 7 / 8 / 360e3)
    # Sixteen: 14 steps within the nodes, one between, and 15/16 at the eight cards' 320 GB/s.
    assert make_cost.collective(1e9, 16) == pytest.approx(8.4 + 14 * 3.4 + 14.0 + 1e9 * 15 / 16 / 320e3)
    # A few bytes over 128 nodes: LL128's latency.
    assert make_cost.collective(1024, 1024) == pytest.approx(14.0 + 896 * 1.9 + 127 * 4.0, abs=0.1)


def test_shapes_are_timms():
    b16 = make_cost.describe("vit_base_patch16_224", 256, (1.0, 1.0, 1.0))
    assert b16.parameters == sum(p.numel() for p in timm.create_model("vit_base_patch16_224").parameters())
    assert b16.patch_flops == 2 * 196 * (16 * 16 * 3) * 768
    assert b16.depth == 12 and b16.block_parameters == 12 * 768**2 + 13 * 768


def test_units(model):
    """An hour of a GPU is 3,600 s of its power and its price."""
    hours, megajoules, dollars = (float(cell.replace(",", "")) for cell in make_cost.costs(1e9 / 3600, 1))
    assert (hours, dollars) == (1.0, make_cost.DOLLARS)
    assert math.isclose(megajoules, 3600 * make_cost.WATTS / 1e6, rel_tol=0.01)
