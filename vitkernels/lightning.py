"""A callback for Lightning's Trainer, of the package ``lightning``.

    trainer = lightning.Trainer(callbacks=[vitkernels.lightning.SwapCallback()], ...)

It calls :func:`vitkernels.accelerate`.
"""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from vitkernels import swap


class SwapCallback(Callback):
    """Swap the kernels into the model of a Lightning ``Trainer``: :func:`vitkernels.accelerate`.

    It does so before Lightning wraps the model for its strategy, for training and for each kind of evaluation. The
    first process prints the report.

    Args:
        **options: For :func:`vitkernels.accelerate`, such as ``strict``.

    Raises:
        NotImplementedError: As for :func:`vitkernels.accelerate`, from the trainer. Also if the module makes its layers
            in ``configure_model``, which Lightning calls later: call :func:`vitkernels.accelerate` there instead.
    """

    def __init__(self, **options: object) -> None:
        self.options = options

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if type(pl_module).configure_model is not LightningModule.configure_model:
            raise NotImplementedError(
                f"SwapCallback: {type(pl_module).__name__} has a configure_model, which makes layers later; call "
                "vitkernels.accelerate(self) at its end instead"
            )
        report = swap.accelerate(pl_module, **self.options)
        if trainer.is_global_zero:
            report.print()
