"""DistributedDataParallel and FSDP2 over an accelerated model: two processes, gloo, gradients as of one process."""

import pytest
import torch

pytest.importorskip("timm")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this build of PyTorch has no gloo", allow_module_level=True)

import distributed_workers as workers


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_processes")
    workers.start(workers.work, 2, folder)
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.fixture(scope="module")
def expected():
    model = workers.build()
    workers.loss_of(model, workers.images()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


WAYS = {
    "ddp after accelerate": (1, None),
    "ddp before accelerate": (1, None),
    "fsdp after accelerate": (1, None),
    # Shards are no plain parameters, and FSDP has made a class of its own of each block.
    "fsdp before accelerate": (0, "a subclass of Block"),
}


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_two_processes_are_those_of_one(way, results, expected):
    blocks, reason = WAYS[way]
    result = results[way]
    assert result["blocks"] == blocks
    torch.testing.assert_close(result["gradients"], expected, rtol=1e-4, atol=1e-6)
    assert max(g.abs().max() for g in expected.values()) > 1e-2, "the tolerance is small beside the gradients"
    assert (reason or "") in result["kept"].get("blocks.0", "")
    assert ("blocks.0" in result["kept"]) == (reason is not None)


@pytest.mark.parametrize("way", WAYS)
def test_no_more_is_sent_and_less_kept_than_without(way, results):
    """What each collective gets is plain timm's to the byte; of what is kept for the backward there is less."""
    result, plain = results[way], results[f"plain {way.partition(' ')[0]}"]
    assert result["sent"] == plain["sent"] and sum(plain["sent"].values()) > 1000
    if result["blocks"]:
        assert result["kept for backward"] < plain["kept for backward"]
