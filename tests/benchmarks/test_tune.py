"""The search, without a GPU: a stand-in tells what compiles, what is right, and how long it takes."""

import dataclasses
import json
import math

import pytest

from benchmarks import tune
from benchmarks.run import Budget
from benchmarks.schema import Times
from benchmarks.tune import SPACES, Lookup, Place, Space, search, table_with
from vitkernels import runtime, tuning
from vitkernels.ops._attention.config import Tiling
from vitkernels.ops._layer_norm import config as layer_norm
from vitkernels.ops._patch_embed import config as patch_embed
from vitkernels.ops._product_config import ProductConfig

H200 = runtime.DeviceFacts("NVIDIA H200", "sm_90", 132, 227 << 10)
SPACE = Space({"block": (16, 32, 64, 128), "warps": (2, 4, 8)})
PLACES = [Place("op", f"C={c}", "layer_norm", "vit_base_patch16_224", "bf16") for c in (1, 2, 3)]


class Lab:
    """Fastest at block 64 and 8 warps; the heuristic takes 100 µs."""

    def __init__(self, clock, refused=lambda config: "", takes=1.0, spread=0.0):
        self.clock, self.refused, self.takes, self.spread = clock, refused, takes, spread
        self.timed: list[dict] = []

    def places(self):
        return PLACES

    def refusal(self, place, config):
        self.clock.now += self.takes
        return self.refused(config)

    def times(self, place, configs, seconds):
        self.clock.now += seconds
        self.timed += configs
        return [self.time(config) for config in configs]

    def time(self, config):
        us = 100.0
        if "block" in config:
            us = 60 + 5 * abs(math.log2(config["block"] / 64))
        us += 3 * math.log2(8 / config.get("warps", 8))
        return Times(us, us - self.spread, us + self.spread, 9)


def outcomes(lab, clock, seconds=600.0, space=SPACE):
    return list(search(lab, Budget(seconds, clock=clock), {"op": space}))


def test_the_fastest_configuration_is_found(clock):
    found = outcomes(Lab(clock), clock)
    assert [o.place for o in found] == PLACES
    for outcome in found:
        assert outcome.config["block"] == 64
        assert outcome.config.get("warps", 8) == 8
        assert outcome.times.median == 60.0
        assert outcome.heuristic.median == 100.0


@pytest.mark.parametrize("reason", ["breaks the contract: spilled_bytes", "output 0: max error 1"])
def test_what_breaks_the_contract_or_is_wrong_is_never_timed(clock, reason):
    lab = Lab(clock, lambda config: reason if config.get("block") == 64 else "")
    for outcome in outcomes(lab, clock):
        assert outcome.config["block"] in (32, 128)
    assert all(config.get("block") != 64 for config in lab.timed)


def test_nothing_is_written_without_a_gain_beyond_the_spread(clock):
    for lab in (Lab(clock, spread=30.0), Lab(clock, lambda config: "refused")):
        assert [o.config for o in outcomes(lab, clock)] == [None] * 3
        assert all(o.reason for o in outcomes(lab, clock))


def test_whole_configurations_start_from_the_first_that_is_allowed(clock):
    start, second = {"block": 16, "warps": 2}, {"block": 32, "warps": 2}
    lab = Lab(clock, lambda config: "spills" if config == start else "")
    found = outcomes(lab, clock, space=dataclasses.replace(SPACE, starts=(start, second)))
    assert [o.config for o in found] == [{"block": 64, "warps": 8}] * 3
    assert start not in lab.timed
    assert {} in lab.timed, "the heuristic is what a winner is held against"
    assert all(set(config) in (set(), {"block", "warps"}) for config in lab.timed)
    none = outcomes(Lab(clock, lambda config: "spills"), clock, space=dataclasses.replace(SPACE, starts=(start,)))
    assert [o.reason for o in none] == ["no configuration to start from: spills"] * 3


def test_the_budget_is_kept_and_worth_comes_first(clock):
    found = outcomes(Lab(clock, takes=2.0), clock, seconds=40.0)
    assert clock.now < 40.0 + 3.0
    assert found[0].config is not None
    assert found[-1].reason == "no time left in the budget"
    assert tune.USEFUL_S == 20.0


def test_a_place_without_a_space_is_named(clock):
    (first, *_) = search(Lab(clock), Budget(10.0, clock=clock), {})
    assert first.reason == "no search space for op"


def test_the_table_passes_its_schema_and_is_what_ops_look_up(clock, tmp_path, monkeypatch):
    found = outcomes(Lab(clock), clock)
    table = table_with(None, "Some GPU", found[:1])
    table = table_with(json.loads(json.dumps(table)), "Some GPU", found[1:])
    assert set(table["entries"]["op"]) == {p.key for p in PLACES}
    row = table["entries"]["op"]["C=1"]
    assert (row["median_us"], row["heuristic_us"]) == (60.0, 100.0)
    assert set(row["versions"]) == {"torch", "triton"}
    assert tuning.check_table(table, "x")["op"]["C=2"]["block"] == 64


def test_tuning_needs_a_gpu(tmp_path):
    import torch

    from benchmarks.environment import Missing

    with pytest.raises(Missing, match="needs a GPU"):
        tune.tune(torch.device("cpu"), Budget(1.0), tmp_path)
    assert not list(tmp_path.iterdir())


def test_spaces_have_the_fields_of_the_configurations():
    configs = {
        "attention_forward": Tiling,
        "attention_backward": Tiling,
        "attention_dmask": Tiling,
        "attention_dq": Tiling,
        "attention_dkv": Tiling,
        "linear": ProductConfig,
        "swiglu_mlp": ProductConfig,
        "layer_norm": layer_norm.LayerNormConfig,
        "layer_norm_backward": layer_norm.LayerNormBackwardConfig,
        "patch_embed": patch_embed.PatchEmbedConfig,
    }
    assert SPACES["attention"].fields == {"provider": ("sdpa",)}, "an answer, no configuration of a kernel"
    for op, space in SPACES.items():
        if op == "attention":
            continue
        fields = {field.name for field in dataclasses.fields(configs[op])}
        assert set(space.fields) <= fields, op
        for start in space.starts:
            assert start.keys() in (set(), fields), f"{op}: a start is empty or whole"
            assert all(value in space.fields[field] for field, value in start.items())


def test_who_attends_is_a_place_of_its_own(monkeypatch):
    import torch

    monkeypatch.setattr(runtime, "device_facts", lambda device: H200)
    monkeypatch.setattr(tuning, "lookup", lookup := Lookup(lambda *asked: None))
    tune.ask_who_attends("attention", "vit_base_patch16_224", "bf16", torch.device("cuda"))
    assert ("attention", "N_q=197,N_kv=197,D=64,torch.bfloat16") in lookup.asked


def test_the_lookup_on_trial():
    lookup = Lookup(lambda op, device, key: {"tuned": 1})
    assert lookup("a", "gpu", "k") == {"tuned": 1}
    lookup.trial = ("a", "k"), {"tried": 2}
    assert lookup("a", "gpu", "k") == {"tried": 2}
    assert lookup("a", "gpu", "other") == {"tuned": 1}
    lookup.trial = ("a", "k"), {}
    assert lookup("a", "gpu", "k") is None, "the heuristic, not an older row"
    assert list(lookup.asked) == [("a", "k"), ("a", "other")]
