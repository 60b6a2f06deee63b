"""Models by their names as people paste them: one resolver, which every command asks, and which downloads nothing."""

from pathlib import Path

import pytest

from vitkernels.tools.cli import main
from vitkernels.tools.console import UserError
from vitkernels.tools.names import Named, resolve

timm = pytest.importorskip("timm")

TAGGED = "vit_base_patch16_224.augreg_in21k_ft_in1k"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("vit_base_patch16_224", "vit_base_patch16_224"),
        (TAGGED, TAGGED),
        ("timm/vit_base_patch16_224", "vit_base_patch16_224"),
        (f"timm/{TAGGED}", TAGGED),
        (f"hf_hub:timm/{TAGGED}", TAGGED),
        (f"hf-hub:timm/{TAGGED}", TAGGED),
        (f"hf-hub:timm/{TAGGED}@main", TAGGED),
        (f"hf://timm/{TAGGED}", TAGGED),
        (f"https://huggingface.co/timm/{TAGGED}", TAGGED),
        (f"https://huggingface.co/timm/{TAGGED}/tree/main?library=timm#usage", TAGGED),
        (f"huggingface.co/timm/{TAGGED}/", TAGGED),
        (f" https://hf.co/timm/{TAGGED}\n", TAGGED),
        ("hf-hub:naver-ai/rdnet_base.nv_in1k", "rdnet_base.nv_in1k"),  # timm's, in another's name
        ("apple/mobileclip_s0_timm", "fastvit_mci0.apple_mclip"),
    ],
)
def test_names_of_timms(text, name):
    assert resolve(text) == Named("timm", name)


@pytest.mark.parametrize("form", ["{}", "{}/", "{}/config.json", "hf/{}", "local-dir:{}"])
@pytest.mark.parametrize("relative", [True, False])
def test_folders(form, relative, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "vit").mkdir(parents=True)
    (tmp_path / "mine" / "vit" / "config.json").write_text("{}")
    given = "mine/vit" if relative else str(tmp_path / "mine" / "vit")
    named = resolve(form.format(given))
    assert named.kind == "folder" and Path(named.name).samefile(given)


def test_a_model_of_the_hub_is_its_folder_in_the_cache_or_else_not_here(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    forms = ("own/vit", "hf_hub:own/vit", "https://huggingface.co/own/vit")
    assert {resolve(form, may_download=True) for form in forms} == {Named("hub", "own/vit")}
    for form in forms:
        with pytest.raises(UserError, match="own/vit is neither a folder nor in the Hugging Face hub's cache"):
            resolve(form)
    place = tmp_path / "models--own--vit"
    folder = place / "snapshots" / "0123456"
    folder.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0123456")
    (folder / "config.json").write_text('{"architecture": "test_vit"}')
    assert {resolve(form) for form in forms} == {Named("folder", str(folder))}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' names no model; expected"),
        ("timm/", "'timm/' names no model"),
        ("vit_bse_patch16_224", "is neither a model of timm nor a folder with a config.json; did you mean vit_base"),
        ("timm/vit_bse_patch16_224.tag", "timm has no model 'vit_bse_patch16_224.tag'; did you mean vit_base"),
        ("hf_hub:timm/vit_bse_patch16_224", "timm has no model 'vit_bse_patch16_224'; did you mean vit_base"),
        ("./nowhere", "there is no folder nowhere"),
        ("/nowhere/at/all", "there is no folder /nowhere/at/all"),
        ("hf/nowhere", "there is no folder nowhere"),
        ("empty", "the folder empty has no config.json"),
        ("https://example.com/vit", "names no model"),
        ("a/b/c", "names no model"),
    ],
)
def test_what_names_nothing_is_told_in_a_line(text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as error:
        resolve(text)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_explain_and_traffic_take_them(capsys):
    assert main(["explain", "timm/test_vit"]) == 0
    plain = capsys.readouterr().out
    assert main(["explain", "https://huggingface.co/timm/test_vit.r160_in1k"]) == 0
    assert capsys.readouterr().out == plain
    assert "FusedBlock" in plain
    for command in (["explain"], ["inspect", "--traffic"]):
        assert main([*command, "hf-hub:own/vit"]) == 2
        assert "own/vit is neither a folder nor in" in capsys.readouterr().err


def test_a_broken_config_is_named(tmp_path, capsys):
    config = tmp_path / "config.json"
    for text, words in (
        ("{", f"cannot read {config}: no JSON"),
        ("[1]", f"{config} holds a list"),
        ('{"a": 1}', f"{config} names neither"),
    ):
        config.write_text(text)
        assert main(["explain", str(tmp_path)]) == 2
        assert words in capsys.readouterr().err
