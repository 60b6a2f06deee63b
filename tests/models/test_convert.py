"""Weights of timm, torchvision and transformers, loaded and given back."""

import json
import os
import pickle

import pytest
import torch
from torch import nn

from vitkernels import use_backend
from vitkernels.models import VisionTransformer, convert

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT  # noqa: E402

from_timm, from_torchvision, from_hf = (
    VisionTransformer.from_timm,
    VisionTransformer.from_torchvision,
    VisionTransformer.from_hf,
)


def shaken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():  # biases of zero and a LayerScale of 1e-5 would hide what they do
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.double().eval()


@torch.no_grad()
def assert_same(ours: nn.Module, theirs, size: int = 28) -> None:
    """In fp64, by PyTorch's own ops: nothing but a wrong weight or option makes a difference that shows."""
    assert next(ours.parameters()).dtype == torch.float64
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    with use_backend("torch"):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


TIMM = {
    "vit": ("vit_tiny_patch16_224", {}),
    "deit": ("deit_tiny_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "dinov2": ("vit_small_patch14_dinov2", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "clip": ("vit_base_patch32_clip_quickgelu_224", {}),
    "average": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "packed SwiGLU": ("vit_giant_patch14_reg4_dinov2", {}),
    "gate last": ("vit_tiny_patch16_224", {"mlp_layer": timm.layers.GluMlp, "act_layer": nn.GELU}),
    "SwiGLU": ("vit_tiny_patch16_224", {"mlp_layer": timm.layers.SwiGLU, "act_layer": nn.SiLU}),
    "QK-norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "no bias": ("vit_tiny_patch16_224", {"qkv_bias": False, "proj_bias": False, "class_token": False, "pos_embed": ""}),
    "no norm": ("vit_tiny_patch16_224", {"final_norm": False, "pool_include_prefix": True, "global_pool": "max"}),
}
CUT = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 5}


def timm_model(case: str) -> nn.Module:
    name, more = TIMM[case]
    if more.get("class_token") is False:
        more = {**more, "global_pool": "avg"}
    return shaken(timm.create_model(name, **{**CUT, **more}))


@pytest.mark.parametrize("case", TIMM)
def test_timm_and_back(case):
    model = timm_model(case)
    ours = from_timm(model)
    assert_same(ours, model)
    state, original = ours.state_dict(), model.state_dict()
    assert list(state) == list(original)
    assert all(torch.equal(state[name], original[name]) for name in original)
    assert all(state[name].data_ptr() != original[name].data_ptr() for name in original), "copies, not shared memory"
    back = ours.to_timm()
    assert type(back) is type(model)
    assert all(torch.equal(tensor, original[name]) for name, tensor in back.state_dict().items())
    x = torch.randn(1, 3, 28, 28, dtype=torch.float64)
    assert torch.equal(back.eval()(x), model(x))
    features = from_timm(model, features_only=True)
    assert_same(features, lambda x: model.forward_features(x))


def test_timm_from_names_files_and_directories(tmp_path):
    model = timm_model("registers")
    name, _ = TIMM["registers"]
    assert list(from_timm(name, pretrained=False, **CUT).state_dict()) == list(model.state_dict())
    from safetensors.torch import save_file

    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save({"epoch": 3, "model": model.state_dict()}, tmp_path / "run.pth")
    for path in (tmp_path / "model.safetensors", tmp_path / "run.pth", str(tmp_path)):
        assert_same(from_timm(path, architecture=name, **CUT), model)
    config = {
        "architecture": name,
        "num_classes": 5,
        "model_args": {k: v for k, v in CUT.items() if k != "num_classes"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(from_timm(tmp_path), model)
    with pytest.raises(ValueError, match=r"run.pth says nothing of its architecture"):
        from_timm(tmp_path / "run.pth")
    with pytest.raises(TypeError, match="a model is taken as it is; num_classes can be given with a name or a path"):
        from_timm(model, num_classes=3)


def test_siglip_of_timm_gives_tokens_alone():
    model = shaken(timm.create_model("vit_so400m_patch14_siglip_384", **{**CUT, "num_classes": 0}))
    with pytest.raises(NotImplementedError, match=r"pools by attention .* features_only=True"):
        from_timm(model)
    assert_same(from_timm(model, features_only=True), model.forward_features)


@pytest.mark.parametrize(
    ("name", "more", "reason"),
    [
        ("vit_tiny_patch16_224", {"scale_attn_norm": True}, "unexpected: blocks.0.attn.norm.bias"),
        ("vit_tiny_patch16_224", {"mlp_layer": timm.layers.GatedMlp}, "blocks.0.mlp is a GatedMlp; expected a"),
        ("deit_tiny_distilled_patch16_224", {}, "the model is a VisionTransformerDistilled"),
        ("vit_tiny_patch16_224", {"act_layer": nn.ReLU}, "the activation is a ReLU"),
        ("vit_tiny_patch16_224", {"dynamic_img_pad": True}, "dynamic_img_pad"),
        ("vit_tiny_patch16_224", {"norm_layer": timm.layers.RmsNorm}, "norm1 is a RmsNorm"),
        ("eva02_tiny_patch14_224", {}, "the model is a Eva"),
    ],
)
def test_timm_models_that_do_not_fit(name, more, reason):
    model = timm.create_model(name, **{**CUT, **more})
    with pytest.raises((NotImplementedError, ValueError), match=reason):
        from_timm(model)


def test_hidden_layer_has_no_place_in_timm():
    with pytest.raises(NotImplementedError, match="representation_size"):
        VisionTransformer(**CUT, representation_size=8).to_timm()


@pytest.mark.parametrize("hidden", [None, 12])
def test_torchvision(hidden, tmp_path):
    options = {"image_size": 28, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 48, "num_classes": 5}
    model = shaken(TorchvisionViT(patch_size=14, representation_size=hidden, **options))
    nn.init.normal_(model.heads.head.weight)
    ours = from_torchvision(model)
    assert_same(ours, model)
    state = model.state_dict()
    old = {k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v for k, v in state.items()}
    assert old.keys() != state.keys()
    torch.save(old, tmp_path / "old.pth")
    small = {name: value for name, value in options.items() if name != "image_size"}
    for path in (tmp_path / "old.pth", tmp_path):
        if path.is_dir():
            os.rename(tmp_path / "old.pth", tmp_path / "pytorch_model.bin")
        with pytest.MonkeyPatch.context() as patch:
            # get_model's own architectures have ViT-B's width and more: too slow here
            patch.setattr("torchvision.models.get_model", lambda *_, weights, **more: TorchvisionViT(28, 14, **more))
            loaded = from_torchvision(path, architecture="vit_b_16", representation_size=hidden, **small)
        assert_same(loaded, model)
    assert_same(from_torchvision(model, features_only=True), lambda x: tokens_of_torchvision(model, x))
    with pytest.raises(ValueError, match="says nothing of its architecture"):
        from_torchvision(tmp_path)


def tokens_of_torchvision(model, x):
    x = model._process_input(x)
    return model.encoder(torch.cat([model.class_token.expand(len(x), -1, -1), x], dim=1))


def test_torchvision_names_and_what_does_not_fit():
    ours = from_torchvision("vit_b_32", weights=None)
    assert (len(ours.blocks), ours.embed_dim, ours.patch_embed.patch_size) == (12, 768, (32, 32))
    from torchvision.models.vision_transformer import ConvStemConfig

    stem = [ConvStemConfig(8, 3, 16)]
    model = TorchvisionViT(32, 16, 1, 2, 32, 48, conv_stem_configs=stem)
    with pytest.raises(NotImplementedError, match="conv_proj is a Sequential; expected a Conv2d"):
        from_torchvision(model)


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 28,
    "patch_size": 14,
}
DINO = {**{k: v for k, v in SMALL.items() if k != "intermediate_size"}, "mlp_ratio": 2}
PROJECTED = {**SMALL, "projection_dim": 6}


def logits(output):
    return output.logits


def pooled(output):
    return output.pooler_output


def tokens(output):
    return output.last_hidden_state


HF = {
    "vit": ("ViTForImageClassification", "ViTConfig", {**SMALL, "num_labels": 5}, logits),
    "vit without qkv bias": ("ViTForImageClassification", "ViTConfig", {**SMALL, "qkv_bias": False}, logits),
    "vit with a pooler": ("ViTModel", "ViTConfig", {**SMALL, "pooler_output_size": 12}, pooled),
    "deit": ("DeiTForImageClassification", "DeiTConfig", SMALL, logits),
    "dinov2": ("Dinov2Model", "Dinov2Config", DINO, pooled),
    "dinov2 registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINO, pooled),
    "siglip classifier": ("SiglipForImageClassification", "SiglipConfig", {"vision_config": SMALL}, logits),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", SMALL, pooled),
    "clip projected": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", PROJECTED, lambda out: out.image_embeds),
}


def hf_model(name: str, config: str, options: dict) -> nn.Module:
    return shaken(getattr(transformers, name)(getattr(transformers, config)(**options)))


@pytest.mark.parametrize("case", HF)
def test_hf(case, tmp_path):
    name, config, options, pick = HF[case]
    model = hf_model(name, config, options)
    assert_same(from_hf(model), lambda x: pick(model(x)))
    model.save_pretrained(tmp_path)  # under release 4's names, whatever the module's are
    assert_same(from_hf(tmp_path), lambda x: pick(model(x)))
    ours = from_hf(str(tmp_path))
    if case != "vit with a pooler":
        back, images = ours.to_timm().eval(), torch.randn(2, 3, 28, 28, dtype=torch.float64)
        torch.testing.assert_close(back(images), pick(model(images)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("release", [4, 5])
def test_key_names_of_both_releases_of_transformers(release, tmp_path):
    from safetensors.torch import load_file, save_file

    name, config, options, pick = HF["vit"]
    model = hf_model(name, config, options)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    keys = load_file(file).keys()
    if release == 4:
        assert "vit.encoder.layer.1.attention.attention.query.weight" in keys
    else:
        save_file({k: v.clone() for k, v in model.state_dict().items()}, file)
        assert "vit.layers.1.attention.q_proj.weight" in load_file(file)
    assert_same(from_hf(tmp_path), lambda x: pick(model(x)))


FEATURES = {
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", SMALL, "pools by attention"),
    "dinov2 classifier": ("Dinov2ForImageClassification", "Dinov2Config", DINO, "the mean of the patches"),
    "deit with a teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", SMALL, "two heads are averaged"),
}


@pytest.mark.parametrize("case", FEATURES)
def test_hf_heads_that_there_are_none_of_here(case):
    name, config, options, reason = FEATURES[case]
    model = hf_model(name, config, options)
    with pytest.raises(NotImplementedError, match=rf"{reason}.*features_only=True"):
        from_hf(model)
    inner = getattr(model, getattr(model, "base_model_prefix", ""), model)
    assert_same(from_hf(model, features_only=True), lambda x: tokens(inner(x)))


def test_tower_of_a_pair(tmp_path):
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    clip = shaken(transformers.CLIPModel(transformers.CLIPConfig(vision_config=SMALL, text_config=text)))
    clip.save_pretrained(tmp_path)
    assert_same(from_hf(tmp_path), lambda x: clip.visual_projection(clip.vision_model(x).pooler_output))
    siglip = transformers.SiglipModel(transformers.SiglipConfig(vision_config=SMALL, text_config=text))
    siglip = shaken(siglip)
    assert_same(from_hf(siglip, features_only=True), lambda x: siglip.vision_model(x).last_hidden_state)


@pytest.mark.parametrize(
    ("config", "more", "reason"),
    [
        ("Dinov2Config", {"use_swiglu_ffn": True}, "its MLPs are SwiGLU"),
        ("ViTConfig", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("BeitConfig", {}, "model_type is 'beit'; expected one of vit, deit, dinov2"),
    ],
)
def test_hf_models_that_do_not_fit(config, more, reason, tmp_path):
    made = getattr(transformers, config)(**{**SMALL, **more})
    made.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(NotImplementedError, match=reason):
        from_hf(tmp_path)


def test_hub_names_are_downloaded(tmp_path, monkeypatch):
    import huggingface_hub

    name, config, options, pick = HF["clip"]
    model = hf_model(name, config, options)
    model.config.save_pretrained(tmp_path)
    asked = []

    def snapshot_download(repository, allow_patterns):
        asked.append(repository)
        if "pytorch_model.bin" in allow_patterns:  # the repository has no safetensors
            torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_same(from_hf("someone/clip"), lambda x: pick(model(x)))
    assert asked == ["someone/clip"] * 2


def test_weights_in_parts(tmp_path):
    name, config, options, pick = HF["vit"]
    model = hf_model(name, config, options)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_same(from_hf(tmp_path), lambda x: pick(model(x)))


def test_wrong_keys_are_one_error_that_lists_them():
    model = timm_model("vit")
    state = model.state_dict()
    del state["blocks.1.mlp.fc2.bias"], state["norm.weight"]
    state["surprise"] = torch.zeros(1)
    state["pos_embed"] = torch.zeros(1, 10, 32)
    wanted = VisionTransformer(**convert.timm_config(model)).state_dict()
    with pytest.raises(ValueError) as caught:
        convert.check_state(state, wanted, "my.pth")
    assert str(caught.value) == (
        "the weights of my.pth do not fit, by timm's names: 2 missing: blocks.1.mlp.fc2.bias, norm.weight; "
        "1 unexpected: surprise; 1 of another shape: pos_embed is (1, 10, 32), expected (1, 5, 32); "
        "set_input_size resamples positions"
    )


def test_positions_are_not_resampled_unasked(tmp_path):
    torch.save(timm_model("vit").state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=r"pos_embed is \(1, 5, 32\), expected \(1, 10, 32\)"):
        from_timm(tmp_path / "vit.pth", architecture="vit_tiny_patch16_224", **{**CUT, "img_size": 42})


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def test_bad_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, write in {
        "code.pth": lambda f: torch.save({"weight": Payload()}, f),
        "plain.pth": lambda f: pickle.dump(Payload(), f),
        "cut.pth": lambda f: f.write(b"PK\x03\x04 and no more"),
        "empty.pth": lambda f: None,
    }.items():
        with open(name, "wb") as file:
            write(file)
        said = r"holds posix\.mkdir, which is not loaded" if name == "code.pth" else "is no whole file of plain tensors"
        with pytest.raises(ValueError, match=f"{name} {said}"):
            convert.read_weights(name)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        convert.read_weights(tmp_path / "cut.safetensors")
    torch.save({"weight": torch.zeros(1), "lr": 0.1}, "mixed.pth")
    with pytest.raises(ValueError, match="holds something else than tensors: lr"):
        convert.read_weights("mixed.pth")
    with pytest.raises(FileNotFoundError, match="holds none of model"):
        convert.read_weights(tmp_path)


def test_safetensors_come_first(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert convert.read_weights(tmp_path)["weight"] == 1


@pytest.mark.parametrize("hidden", [4304, 2730, 4095, 6144, 8960])
@pytest.mark.parametrize("width", [1152, 1024, 1536, 1408, 768])
def test_mlp_ratio_is_exact(hidden, width):
    assert int(width * convert.mlp_ratio(width, hidden)) == hidden
