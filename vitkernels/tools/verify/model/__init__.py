"""Verify the user's own model: load it, find the shapes that it gives the ops, and judge its accelerated copy."""

from vitkernels.tools.verify.model.checks import Unreached, check_model, model_checks
from vitkernels.tools.verify.model.load import Inputs, as_inputs, load
from vitkernels.tools.verify.model.shapes import shapes

__all__ = ["Inputs", "Unreached", "as_inputs", "check_model", "load", "model_checks", "shapes"]
