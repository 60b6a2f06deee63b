"""Resolve a model's name as users paste it, and build the model: every command's one road from a name to a model.

A name is one of timm or of the hub, a web address, or a folder with a config.json. Nothing is downloaded unless the
caller asks for weights. timm's models on the hub are recognized by name; other models of the hub are looked up in its
cache on this machine.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Literal, NamedTuple

from torch import nn

from vitkernels.models import weights
from vitkernels.tools.console import UserError, import_timm, import_transformers, near, one_line

FORMS = "a name of timm (NAME or timm/NAME) or of the Hugging Face hub (OWNER/NAME), or a folder with a config.json"
_HUB = re.compile(r"(hf[_-]hub:|hf://|(https?://)?(www\.)?(huggingface\.co|hf\.co)/)(?P<id>.*)")
_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class Named(NamedTuple):
    """The model that a name stands for.

    Attributes:
        kind: ``timm``, a model of timm; ``folder``, a folder with a ``config.json``; ``hub``, a model of the Hugging
            Face hub that is not on this machine.
        name: timm's name, the folder's path, or the hub's ``owner/name``.
    """

    kind: Literal["timm", "folder", "hub"]
    name: str

    @property
    def for_timm(self) -> Named:
        """The model by its name for ``timm.create_model``; a folder may describe it to transformers, too."""
        return Named("timm", {"timm": "", "folder": "local-dir:", "hub": "hf-hub:"}[self.kind] + self.name)

    @property
    def has_weights(self) -> bool:
        """Whether it is a folder that holds weights."""
        files = ("*.safetensors", "pytorch_model*.bin")
        return self.kind == "folder" and any(file for form in files for file in Path(self.name).glob(form))


def resolve(text: str, *, may_download: bool = False) -> Named:
    """Return the model that ``text`` stands for.

    Args:
        text: ``NAME`` or ``timm/NAME`` of timm, with or without a tag; a folder, also as ``hf/DIR`` or
            ``local-dir:DIR``, or the ``config.json`` in it; ``OWNER/NAME`` of the hub, also after ``hf_hub:`` or
            ``hf-hub:``, or the address of its page.
        may_download: Also return a model of the hub that is not on this machine; the caller downloads it.

    Raises:
        UserError: There is no such model or folder, it is not on this machine, or timm is needed to resolve it and
            cannot be imported.
    """
    given = text.strip()
    for prefix in ("hf/", "local-dir:"):
        if given.startswith(prefix) and given != prefix:
            return _folder(Path(given.removeprefix(prefix)).expanduser())
    here = Path(given).expanduser()
    if here.name == "config.json" and here.is_file():
        return _folder(here.parent)
    if given and (given.startswith((".", "/", "~")) or (here / "config.json").is_file()):
        return _folder(here)
    of_hub = _HUB.fullmatch(given)
    id = given if of_hub is None else "/".join(re.split("[?#@]", of_hub["id"])[0].split("/")[:2])
    owner, slash, name = id.rpartition("/")
    if not name or (slash and not _ID.fullmatch(id)):
        raise UserError(f"{given!r} names no model; expected {FORMS}")
    if owner in ("", "timm"):
        timm = import_timm()
        if timm.is_model(name):
            return Named("timm", name)
    if slash and (found := _of_hub(id)) is not None:
        return found
    if owner not in ("", "timm"):
        if may_download:
            return Named("hub", id)
        raise UserError(
            f"{id} is neither a folder nor in the Hugging Face hub's cache on this machine, and nothing is downloaded "
            f"here: fetch it first, as with hf download {id}, or give a folder with its config.json"
        )
    if here.is_dir():
        return _folder(here)  # raises an error that says what is missing
    hint = near(name.partition(".")[0], timm.list_models())
    if slash:
        raise UserError(f"timm has no model {name!r}{hint}")
    raise UserError(f"{given!r} is neither a model of timm nor a folder with a config.json{hint}")


def _of_hub(id: str) -> Named | None:
    """Return the timm model with weights on the hub as ``id``, or the cached folder of ``id``; None if neither."""
    with contextlib.suppress(UserError):  # without timm, it may still be in the cache
        timm = import_timm()
        for name in timm.list_pretrained():
            if timm.get_pretrained_cfg(name).hf_hub_id == id:
                return Named("timm", name)
    with contextlib.suppress(ImportError):
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(id, "config.json")
        if isinstance(config, str):
            return Named("folder", str(Path(config).parent))
    return None


def build(model: str | Named, *, weights: bool = False, **options) -> tuple[nn.Module, str]:
    """Build a model, and say what was built. Under ``torch.device("meta")`` it has no data.

    Args:
        model: What :func:`resolve` returned, or a text for it.
        weights: Load the weights in the model's folder, or timm's pretrained ones, which are downloaded. Otherwise the
            weights are random.
        options: Further arguments of ``timm.create_model``.

    Raises:
        UserError: There is no such model, a package that it needs is missing, or it or its weights cannot be loaded.
    """
    named = resolve(model) if isinstance(model, str) else model
    described = read_config(named.name) if named.kind == "folder" else {}
    if "model_type" in described:
        return _of_transformers(Path(named.name), weights)
    timm = import_timm()
    if described:
        config, architecture = Path(named.name) / "config.json", described["architecture"]
        if not (isinstance(architecture, str) and architecture):
            raise UserError(f"{config} names neither a model_type of transformers nor an architecture of timm")
        if not timm.is_model(architecture):
            hint = near(architecture.partition(".")[0], timm.list_models())
            raise UserError(f"{config} names {architecture!r}, which is no model of timm{hint}")
    try:
        # From pickles timm loads only plain tensors.
        made = timm.create_model(named.for_timm.name, pretrained=weights, **options)
    except Exception as error:  # timm, the hub, the network and the cache raise many kinds of errors
        why = f"{type(error).__name__}: {one_line(error)}"
        if not weights or described:
            raise UserError(f"{named.name} cannot be built: {why}") from error
        hint = "check the network, or give a file with --weights FILE"
        raise UserError(f"no pretrained weights for {named.for_timm.name} ({why}); {hint}") from error
    what = f"{type(made).__name__} in {named.name}" if described else f"timm's {named.name}"
    return made, f"{what}, {'its weights' if weights else 'random weights'}"


def _of_transformers(folder: Path, weights: bool) -> tuple[nn.Module, str]:
    transformers = import_transformers()
    offline = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **offline)
        classifies = any(name.endswith("ForImageClassification") for name in config.architectures or ())
        auto = transformers.AutoModelForImageClassification if classifies else transformers.AutoModel
        if not weights:
            made = auto.from_config(config, trust_remote_code=False)
            return made, f"{type(made).__name__} in {folder}, random weights"
        safe = any(folder.glob("*.safetensors"))
        made, info = auto.from_pretrained(folder, use_safetensors=safe, output_loading_info=True, **offline)
    except Exception as error:  # each class of transformers raises its own errors for a bad config
        wrong = f"{folder} cannot be loaded" if weights else f"{folder / 'config.json'} describes no model"
        raise UserError(f"{wrong}: {type(error).__name__}: {one_line(error)}") from error
    missing = len(info["missing_keys"])
    note = f", {missing} of them missing and random" if missing else ""
    return made, f"{type(made).__name__} in {folder}, its weights{note}"


def read_config(folder: str | Path) -> dict:
    """Return the contents of the ``config.json`` in ``folder``.

    Raises:
        UserError: It cannot be read, or is neither of transformers nor of timm.
    """
    config = Path(folder) / "config.json"
    try:
        described = weights.read_config(config)
    except OSError as error:
        raise UserError(f"cannot read {config}: {error.strerror or one_line(error)}") from error
    except ValueError as error:
        raise UserError(one_line(error)) from error
    if not {"model_type", "architecture"} & set(described):
        raise UserError(f"{config} names neither a model_type of transformers nor an architecture of timm")
    return described


def _folder(folder: Path) -> Named:
    if not (folder / "config.json").is_file():
        is_folder = f"the folder {folder} has no config.json" if folder.is_dir() else f"there is no folder {folder}"
        raise UserError(f"{is_folder}; expected what save_pretrained() writes")
    return Named("folder", str(folder))
