"""The kernels in other libraries' trainers: a few steps leave the weights of plain training."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

timm = pytest.importorskip("timm")

from parity import judge  # noqa: E402

from vitkernels import accelerate  # noqa: E402

STEPS, BATCH, CLASSES = 3, 4, 3
RATE = 0.1
ON_GPU = torch.cuda.is_available()


def images(seed: int, dtype: torch.dtype) -> list[dict]:
    """Return images with labels, as transformers' models take them; every dtype gets the same."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(STEPS * BATCH, 3, 32, 32, generator=generator)
    return [{"pixel_values": x.to(dtype), "labels": i % CLASSES} for i, x in enumerate(pixels)]


def timm_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return timm.models.VisionTransformer(
        img_size=32, patch_size=16, embed_dim=32, depth=1, num_heads=2, num_classes=CLASSES
    )


def is_swapped(model: nn.Module) -> bool:
    return any(type(module).__module__.startswith("vitkernels.swap.") for module in model.modules())


def agrees(train, build) -> None:
    """Judge the weights that ``train(model, data, swap)`` leaves, with the swap and without.

    ``train`` returns the trained model. The truth is plain training in fp64.
    """

    def draw(seed: int):
        trained = []
        for swap, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.float64)):
            model = train(build(seed).to(dtype), images(seed, dtype), swap)
            assert is_swapped(model) == swap
            trained.append({name: p.detach().cpu() for name, p in model.named_parameters()})
        start = dict(build(seed).named_parameters())
        assert all(not torch.equal(p, start[name]) for name, p in trained[0].items() if not name.endswith("k.bias"))
        return tuple(trained)

    judge(draw)


def loop(model: nn.Module, loader, optimizer: torch.optim.Optimizer, backward) -> None:
    for batch in loader:
        loss = F.cross_entropy(model(batch["pixel_values"]), batch["labels"])
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()


@pytest.mark.parametrize("when", ["before prepare", "after prepare"])
def test_accelerate_of_hugging_face(when):
    library = pytest.importorskip("accelerate")

    def train(model, data, swap):
        accelerator = library.Accelerator(cpu=not ON_GPU)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        if swap and when == "before prepare":
            accelerate(model)
        loader = torch.utils.data.DataLoader(data, batch_size=BATCH)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        if swap and when == "after prepare":
            accelerate(model)
        loop(model, loader, optimizer, accelerator.backward)
        return accelerator.unwrap_model(model)

    agrees(train, timm_model)


def hf_model(seed: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        image_size=32, patch_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def hf_trainer(model, data, folder, callbacks, **options):
    transformers = pytest.importorskip("transformers", minversion="4.53")  # vitkernels.hf
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH, optim="sgd", learning_rate=RATE,
        lr_scheduler_type="constant", report_to=[], save_strategy="no", use_cpu=not ON_GPU, disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    return transformers.Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=callbacks, **options)


def test_trainer_of_transformers(tmp_path, capsys):
    hf = pytest.importorskip("vitkernels.hf", exc_type=ImportError)

    def train(model, data, swap):
        trainer = hf_trainer(model, data, tmp_path, [hf.SwapCallback(strict=True)] if swap else [])
        trainer.train()
        assert capsys.readouterr().out.count(" swapped, ") == swap, "the report, once"
        return trainer.model

    agrees(train, hf_model)


def test_trainer_of_transformers_with_model_init_and_evaluation(tmp_path):
    """model_init makes a model when the trainer is made, and another one when training begins."""
    hf = pytest.importorskip("vitkernels.hf", exc_type=ImportError)
    data = images(0, torch.float32)
    trainer = hf_trainer(None, data, tmp_path, [hf.SwapCallback()], model_init=lambda: hf_model(0))
    evaluated = trainer.model
    for _ in range(2):
        assert is_swapped(trainer.model)
        assert trainer.evaluate()["eval_loss"] > 0
        trainer.train()
    assert trainer.model is not evaluated


def lightning_module(model: nn.Module, **hooks):
    lightning = pytest.importorskip("lightning.pytorch", exc_type=ImportError)

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            return F.cross_entropy(self.model(batch["pixel_values"]), batch["labels"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=RATE)

    return type("Classifier", (Classifier,), hooks)()


def fit(module, data, folder, callbacks) -> None:
    lightning = pytest.importorskip("lightning.pytorch", exc_type=ImportError)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="gpu" if ON_GPU else "cpu", devices=1, logger=False, callbacks=callbacks,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=BATCH))


def test_trainer_of_lightning(tmp_path, capsys):
    pytest.importorskip("lightning.pytorch", exc_type=ImportError)
    from vitkernels.lightning import SwapCallback

    def train(model, data, swap):
        fit(lightning_module(model), data, tmp_path, [SwapCallback(strict=True)] if swap else [])
        assert capsys.readouterr().out.count(" swapped, ") == swap, "the report, once"
        return model

    agrees(train, timm_model)


def test_lightning_module_that_makes_its_layers_later(tmp_path):
    pytest.importorskip("lightning.pytorch", exc_type=ImportError)
    from vitkernels.lightning import SwapCallback

    module = lightning_module(timm_model(0), configure_model=lambda self: None)
    with pytest.raises(NotImplementedError, match=r"SwapCallback: Classifier has a configure_model"):
        fit(module, images(0, torch.float32), tmp_path, [SwapCallback()])


def test_strict_stops_the_trainer(tmp_path):
    """Nothing of the model can be swapped."""
    pytest.importorskip("lightning.pytorch", exc_type=ImportError)
    from vitkernels.lightning import SwapCallback

    module = lightning_module(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, CLASSES)))
    with pytest.raises(NotImplementedError, match=r"strict, and no module of Classifier can be swapped"):
        fit(module, images(0, torch.float32), tmp_path, [SwapCallback(strict=True)])
