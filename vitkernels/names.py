"""Resolve a model's name as users paste it: a name of timm or the hub, a web address, or a folder with a config.json.

Nothing is downloaded. timm's models on the hub are recognized by name; other models of the hub are looked up in its
cache on this machine.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Literal, NamedTuple

from vitkernels.console import UserError, import_timm, near, one_line
from vitkernels.models import weights

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
    def for_timm(self) -> str:
        """The model's name for ``timm.create_model``."""
        return {"timm": "", "folder": "local-dir:", "hub": "hf-hub:"}[self.kind] + self.name


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
