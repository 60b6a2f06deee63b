"""Tensor parallelism: two processes, gloo, against one process that has the whole model."""

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("transformers")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this build of PyTorch has no gloo", allow_module_level=True)

import distributed_workers
import parallel_workers as workers

from vitkernels.testing import check

DEPTH, TOKENS, BATCH, CHANNELS = 2, 5, 3, 48


@pytest.fixture(scope="module", params=[0, 1], ids=["rank0", "rank1"])
def results(request, both):
    return both[request.param]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor_parallel")
    distributed_workers.start(workers.work, 2, folder)
    distributed_workers.start(workers.work_on_four, 4, folder)
    return [
        torch.load(folder / f"results{rank}.pt", weights_only=True)
        | {"four": torch.load(folder / "results_of_four.pt", weights_only=True)}
        for rank in (0, 1)
    ]


@pytest.mark.parametrize("backend", ["torch", "emulated"])
@pytest.mark.parametrize("name", workers.NAMES)
def test_outputs_and_gradients_are_those_of_the_whole_model(name, backend, results):
    result, plain = results[name][backend], results[name]["plain"]
    assert results[name]["swapped"] == 2 * DEPTH and results[name]["kept"] == []
    torch.testing.assert_close(result["output"], plain["output"], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(result["gradients"], plain["gradients"], rtol=1e-9, atol=1e-11)
    assert max(g.abs().max() for g in plain["gradients"].values() if g is not None and g.numel()) > 1e-3


def test_two_all_reduces_a_block_forward_and_two_backward(results):
    """Besides the tokens only what all heads share is summed: a gamma, and the norms of queries and keys."""
    tokens = 8 * BATCH * TOKENS * CHANNELS
    shared = 8 * (CHANNELS + 4 * CHANNELS // 4)
    sent = results["vit"]["emulated"]["sent"]
    assert sent == {"c10d::allreduce_": DEPTH * (4 * tokens + shared)}
    assert results["own"]["emulated"]["sent"] == {"c10d::allreduce_": DEPTH * 4 * tokens}


def test_half_of_the_memory(results):
    """A process holds half of all blocks' matrices, and keeps less for the backward than the whole model does."""
    for name in workers.NAMES:
        result = results[name]
        assert 2 * result["own shards"] == result["all shards"] >= result["matrices of blocks"] > 0
        assert result["emulated"]["kept"] < result["plain"]["kept"]


def test_training_saving_and_loading(results):
    training = results["training"]
    torch.testing.assert_close(training["sharded"]["norms"], training["whole"]["norms"], rtol=1e-9, atol=0)
    torch.testing.assert_close(training["sharded"]["state"], training["whole"]["state"], rtol=1e-7, atol=1e-9)
    assert training["sharded"]["norms"][0] > 0.1, "the gradients were clipped"
    same = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(training["loaded"], training["sharded"]["state"], **same)
    torch.testing.assert_close(training["twice"], {k: 2 * v for k, v in training["whole"]["state"].items()}, **same)
    torch.testing.assert_close(training["restored"], training["twice"], **same)
    assert training["class"] == "Block" and not training["pickle has ours"]


def test_fsdp_over_the_other_dimension_of_a_mesh(both):
    four = both[0]["four"]
    torch.testing.assert_close(four["gradients"], four["expected"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(four["state"], four["expected state"], rtol=0, atol=0)


def test_the_checkpoint_of_two_processes_on_four(both):
    torch.testing.assert_close(both[0]["four"]["loaded"], both[0]["training"]["sharded"]["state"], rtol=0, atol=0)


def test_all_processes_hold_the_same(both):
    same = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(both[0]["training"]["sharded"]["state"], both[1]["training"]["sharded"]["state"], **same)
    for name in workers.NAMES:
        torch.testing.assert_close(both[0][name]["emulated"]["output"], both[1][name]["emulated"]["output"], **same)


@pytest.mark.parametrize("way", ["drops", "compiled"])
def test_drop_path_and_compile(way, results):
    whole, *sharded = results[way]
    for out in sharded:
        torch.testing.assert_close(out, whole, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", workers.SHARING)
def test_sequence_parallelism(name, results):
    result = results["sequence"][name]
    for backend in ("torch", "emulated"):
        torch.testing.assert_close(result[backend]["output"], result["plain"]["output"], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(result[backend]["gradients"], result["plain"]["gradients"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(result["odd"], results[name]["plain"]["output"], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(*result["between"], rtol=1e-11, atol=1e-12)
    assert result["emulated"]["kept"] < result["not shared"]["kept"]


def test_what_sequence_parallelism_sends(results):
    """A block gathers tokens twice and scatters them twice, forward and backward: the bytes given are counted. The
    first takes its part of what all hold, the last gathers all. Norms' gradients are summed together."""
    tokens = 8 * 4 * TOKENS * CHANNELS
    sent = results["sequence"]["own"]["emulated"]["sent"]
    assert sent.keys() == {"c10d::allreduce_", "c10d::_allgather_base_", "c10d::_reduce_scatter_base_"}
    assert sent["c10d::allreduce_"] == DEPTH * 8 * 4 * CHANNELS
    gathers, scatters = DEPTH * 4 + 2, DEPTH * 4
    assert sent["c10d::_allgather_base_"] == gathers * (tokens + tokens // 2)
    assert sent["c10d::_reduce_scatter_base_"] == scatters * (tokens + tokens // 2)


def test_gradients_of_masks(results):
    for sharded, whole in results["masks"]:
        torch.testing.assert_close(sharded, whole, rtol=1e-9, atol=1e-11)


def test_tied_weights_and_modules(results):
    reasons, shapes = results["tied"]
    assert reasons == ["another module holds one of its weights, too"] * 2
    assert shapes == {f"blocks.{i}.mlp.fc1.weight": (4 * CHANNELS, CHANNELS) for i in (0, 1)}


def test_buffers_become_those_of_the_first_process(results):
    expected = torch.arange(3.0)[:, None].expand(3, 4000), torch.arange(6.0).view(2, 3).t(), torch.zeros(0, 3)
    torch.testing.assert_close(results["layouts"], expected, rtol=0, atol=0)


def test_autocast(both):
    verdict = check("output", *both[0]["autocast"])
    assert verdict.passed, verdict.detail
    torch.testing.assert_close(both[0]["autocast"][0], both[1]["autocast"][0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("case", "text"),
    {
        "not accelerated": "ValueError: parallelize: VisionTransformer has no attention or MLP that can be sharded "
        "over 2; call vitkernels.accelerate first",
        "no mesh": "TypeError: parallelize: mesh is a int; expected a torch.distributed DeviceMesh",
        "two dims": "ValueError: parallelize: the mesh has 2 dimensions",
        "twice": "ValueError: parallelize: blocks.0.attn.qkv.weight is a DTensor already",
        "other seeds": "ValueError: parallelize: the model drops at random, and the processes would draw different",
        "patch dropout": "ValueError: parallelize: the model drops at random, and the processes would draw different",
        "random masks": "ValueError: parallelize: the model drops at random, and the processes would draw different",
        "attention dropout": "NotImplementedError: attention whose heads are sharded cannot drop weights",
        "dropout": "NotImplementedError: an MLP whose hidden features are sharded cannot drop any",
        "second derivative": "RuntimeError: trying to differentiate twice a function that was marked with",
        "hook": "RuntimeError: Attention: vitkernels.parallelize sharded it, so it has only a fused forward, and a "
        "hook on qkv",
        "hook, accelerated again": "RuntimeError: Attention: vitkernels.parallelize sharded it, so it has only a fused "
        "forward, and a hook on qkv",
        "fp8": "NotImplementedError: accelerate: strict, and 6 modules cannot run in fp8",
        "other Linear": "one of its layers is a elsewhere.Linear, not torch's own Linear",
        "windows": "['layers.0.blocks.0.attn', 'layers.0.blocks.1.attn']",
        "uneven": "['its 3 heads cannot be shared evenly by 2 processes', "
        "'its 3 heads cannot be shared evenly by 2 processes']",
        "no block": "ValueError: parallelize: sequence is set, and no block's attention and MLP can both be sharded",
        "transposed": "RuntimeError: Error(s) in loading state_dict for VisionTransformer",
        "shape": "RuntimeError: Error(s) in loading state_dict for VisionTransformer",
    }.items(),
)
def test_errors(case, text, results):
    assert results["errors"][case].startswith(text), results["errors"][case]
