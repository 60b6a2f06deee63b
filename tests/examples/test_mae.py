"""examples/mae.py: against transformers' ViT-MAE, on two processes, killed and resumed, fine-tuned, and bad input."""

import copy

import pytest
import torch

pytest.importorskip("numpy")
pytest.importorskip("PIL.Image", reason="images are decoded with Pillow")
timm = pytest.importorskip("timm")
safetensors = pytest.importorskip("safetensors.torch", reason="weights are safetensors")
pytest.importorskip("sklearn", reason="digits are scikit-learn's")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this build of PyTorch has no gloo", allow_module_level=True)

from training import TINY, command, complaint, curve, here, in_two_processes, resumes, same_curve  # noqa: E402
from training_workers import common, image_data  # noqa: E402
from training_workers import mae as example  # noqa: E402

import vitkernels  # noqa: E402
from vitkernels.models import VisionTransformer  # noqa: E402
from vitkernels.testing.compare import check  # noqa: E402

MODEL, STEPS, SIZE, PATCHES, VISIBLE = "vit_tiny_patch16_224", 5, 16, 16, 4
DECODER = {"dim": 16, "depth": 1, "num_heads": 2}


def options(out, *more: str) -> list[str]:
    """Return the options of a small run on the digits; of options given twice, the last counts."""
    small = [part for key, value in DECODER.items() for part in (f"--decoder-{key.replace('num_', '')}", str(value))]
    epochs = ["--epochs", str(STEPS * 16 / 1347), "--learning-rate", "0.02"]
    given = command("digits", out, "--img-size", str(SIZE), "--checkpoint-every", "2", "--model", MODEL)
    return [*given, *TINY, *small, *epochs, *more]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of one process that nothing interrupts, of PyTorch's ops."""
    out = tmp_path_factory.mktemp("plain")
    here("mae", options(out, "--no-accelerate"))
    return out


def test_two_processes(plain, tmp_path):
    in_two_processes("mae", options(tmp_path, "--micro-batch", "4"))
    same_curve(tmp_path, plain)


def test_killed_and_resumed(plain, tmp_path):
    # In step 4, of 6 parts each.
    resumes("mae", options(tmp_path, "--no-accelerate"), tmp_path, plain, "step-00000002", 3 * 6 + 2)


PACKED = ("--mask-ratio", "0.5", "0.9")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """As ``plain``, where each image hides another share of its patches."""
    out = tmp_path_factory.mktemp("packed")
    here("mae", options(out, "--no-accelerate", *PACKED))
    return out


def test_packed_by_two_processes(packed, tmp_path):
    in_two_processes("mae", options(tmp_path, "--micro-batch", "4", *PACKED))
    same_curve(tmp_path, packed)


def test_packed_killed_and_resumed(packed, tmp_path):
    resumes("mae", options(tmp_path, "--no-accelerate", *PACKED), tmp_path, packed, "step-00000002", 3 * 6 + 2)


def test_packed_rows_of_one_length_are_short_rows(plain, tmp_path):
    here("mae", options(tmp_path, "--mask-ratio", "0.75", "0.75"))
    same_curve(tmp_path, plain)


def test_packed_images_are_those_alone():
    """The loss and its gradients are those of each image by itself, in short rows; the blocks see no padding."""
    transform = example.Masked(image_data.eval_transform(SIZE), PATCHES, [0.5, 0.9])
    samples = image_data.Samples(image_data.open_data("digits", held_out=True), transform, 0)
    batch = common.default_collate([samples[0, i][0] for i in range(6)])
    counts = batch["num_visible"].tolist()
    assert counts == (~batch["mask"]).sum(1).tolist() and len(set(counts)) > 2
    assert min(counts) >= int(PATCHES * 0.1) and max(counts) <= batch["visible"].shape[1] == PATCHES // 2
    images = batch["images"] / 255
    arguments = {"img_size": SIZE, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    model = example.MaskedAutoencoder(VisionTransformer(**arguments), {}, **DECODER)
    shapes = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))

    def one_by_one(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        alone = copy.deepcopy(model).to(dtype)
        losses = [
            alone(images[i : i + 1].to(dtype), batch["visible"][i : i + 1, :n], batch["mask"][i : i + 1])
            for i, n in enumerate(counts)
        ]
        return results(alone, torch.cat(losses))

    def results(model, losses: torch.Tensor) -> dict[str, torch.Tensor]:
        losses.sum().backward()
        return {"loss": losses.detach()} | {name: p.grad for name, p in model.named_parameters()}

    got = results(model, model(images, **{key: batch[key] for key in ("visible", "mask", "num_visible")}))
    assert shapes == [(1, sum(counts) + len(counts), 32)] * 2
    yardstick, truth = one_by_one(torch.float32), one_by_one(torch.float64)
    for name in truth:
        verdict = check(name, got[name], yardstick[name], truth[name])
        assert verdict.passed, f"{name}: {verdict.detail}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests run the kernels")
@pytest.mark.parametrize("more", [(), PACKED], ids=["short", "packed"])
def test_on_the_kernels(more, request, tmp_path):
    pytest.importorskip("triton")
    wanted = request.getfixturevalue("packed" if more else "plain")
    with vitkernels.use_backend("emulated"):
        here("mae", options(tmp_path, "--epochs", str(16 / 1347), "--micro-batch", "16", *more))
    torch.testing.assert_close(curve(tmp_path)[0, [1, 3]].float(), curve(wanted)[0, [1, 3]].float())


def test_encoder_is_timms(plain, tmp_path):
    """timm computes the same features of whole images, and the encoder can be fine-tuned at another size."""
    theirs = timm.create_model(f"local-dir:{plain}", pretrained=True).eval()
    ours = VisionTransformer.from_timm(theirs, features_only=True).eval()
    ours.load_state_dict(safetensors.load_file(plain / "model.safetensors"))
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        got, wanted = ours(images), theirs.forward_features(images)
        verdict = check("tokens", got, wanted, theirs.double().forward_features(images.double()))
    assert verdict.passed, verdict.detail
    first = example.sincos2d((4, 4), 32, num_prefix_tokens=1)
    assert torch.equal(ours.pos_embed.detach(), first), "positions are not trained"
    here("finetune", command("digits", tmp_path, "--model", str(plain), "--img-size", "32", "--steps", "2"))
    assert curve(tmp_path).isfinite().all()


def theirs_by_our_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of transformers' ViT-MAE by the names of the example's model."""
    renamed = {
        "vit.embeddings.cls_token": "encoder.cls_token",
        "vit.embeddings.position_embeddings": "encoder.pos_embed",
        "vit.embeddings.patch_embeddings.projection": "encoder.patch_embed.proj",
        "vit.layernorm": "encoder.norm",
        "vit.layers": "encoder.blocks",
        "decoder.decoder_layers": "decoder",
        "decoder.mask_token": "mask_token",
        "decoder.decoder_embed": "embed",
        "decoder.decoder_norm": "norm",
        "decoder.decoder_pred": "pixels",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.o_proj": "attn.proj",
    }
    found = {}
    for key, tensor in state.items():
        for theirs, ours in renamed.items():
            key = key.replace(theirs, ours)
        found[key] = tensor
    for key in [key for key in found if ".attention.q_proj." in key]:
        parts = [found.pop(key.replace("q_proj", f"{name}_proj")) for name in "qkv"]
        found[key.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    found.pop("decoder.decoder_pos_embed", None)
    return found


def test_loss_and_gradients_are_those_of_transformers():
    """Of the same weights, images and masks; the blocks see the visible patches alone."""
    transformers = pytest.importorskip("transformers", minversion="5", reason="of which the names of weights are")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"decoder_hidden_size": DECODER["dim"], "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    sizes |= {"decoder_intermediate_size": 64, "image_size": SIZE, "patch_size": 4, "layer_norm_eps": 1e-6}
    config = transformers.ViTMAEConfig(**sizes, norm_pix_loss=True, mask_ratio=1 - VISIBLE / PATCHES)
    theirs = transformers.ViTMAEForPreTraining(config).train()
    arguments = {"img_size": SIZE, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    ours = example.MaskedAutoencoder(VisionTransformer(**arguments, num_classes=0), {}, **DECODER)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        theirs.vit.embeddings.position_embeddings.copy_(ours.encoder.pos_embed)  # random weights have none there
        theirs.decoder.decoder_pos_embed.copy_(ours.positions)
    ours.load_state_dict(theirs_by_our_names(theirs.state_dict()))
    images, drawn = torch.randn(3, 3, SIZE, SIZE), example.random_mask(3, PATCHES, 0.75)
    visible = drawn.visible.sort().values

    shapes = []
    for block in ours.blocks:
        block.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    loss = ours(images, visible, drawn.mask)
    loss.mean().backward()
    assert shapes == [(3, 1 + VISIBLE, 32)] * 2 and loss.shape == (3,)
    got = {"loss": loss.detach().mean()} | {name: p.grad for name, p in ours.named_parameters()}

    def reference(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = copy.deepcopy(theirs).to(dtype)
        loss = model(images.to(dtype), noise=drawn.restore.to(dtype)).loss
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach()} | theirs_by_our_names(grads)

    yardstick, truth = reference(torch.float32), reference(torch.float64)
    assert got.keys() == truth.keys()
    for name in truth:
        verdict = check(name, got[name], yardstick[name], truth[name])
        assert verdict.passed, f"{name}: {verdict.detail}"


def test_masks_and_held_out_loss(tmp_path, capsys):
    """An image's mask depends on its epoch and index; the printed loss is the mean over the held-out images."""
    transform = example.Masked(image_data.eval_transform(SIZE), PATCHES, [0.75])
    samples = image_data.Samples(image_data.open_data("digits", held_out=True), transform, 0)
    first, again, later = (samples[place][0] for place in ((0, 1), (0, 1), (1, 1)))
    assert torch.equal(first["mask"], again["mask"]) and not torch.equal(first["mask"], later["mask"])
    assert first["mask"].sum() == PATCHES - VISIBLE and not first["mask"][first["visible"]].any()

    here("mae", options(tmp_path, "--val", "digits", "--micro-batch", "64", "--epochs", str(16 / 1347)))
    args = example.argparse.Namespace(model=MODEL, img_size=SIZE, seed=0, decoder_dim=16, decoder_depth=1)
    args.decoder_heads, args.model_kwargs = 2, {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    args.model_kwargs["mlp_ratio"] = 2.0
    model = example.make_model(args)
    held = torch.distributed.checkpoint
    state = {"model": model.state_dict()}
    held.load(state, checkpoint_id=next(tmp_path.glob("step-*")), no_dist=True)
    model.load_state_dict(state["model"])
    items = [samples[0, i][0] for i in range(len(samples.data))]
    batch = common.default_collate(items)
    with torch.no_grad():
        loss = float(example.loss_of(model, batch, None)) / len(items)
    assert f"held out: loss {loss:.4f} of {len(items)} images" in capsys.readouterr().out


def test_bad_input(plain, tmp_path, capsys):
    for wrong in ("0", "1", "most"):
        with pytest.raises(SystemExit):
            here("mae", options(tmp_path, "--mask-ratio", wrong))
        assert f"{wrong!r} is no number from 0.01 to 0.99" in capsys.readouterr().err
    for wrong in (("0.9", "0.6"), ("0.1", "0.2", "0.3")):
        with pytest.raises(SystemExit):
            here("mae", options(tmp_path, "--mask-ratio", *wrong))
        assert "expected one share, or a lower and a higher one" in capsys.readouterr().err
    kwargs = ("--model-kwargs", "drop_rate=0.1")
    said = complaint("mae", options(tmp_path, "--model", "swin_tiny_patch4_window7_224", "--img-size", "224", *kwargs))
    assert "there is no autoencoder of swin_tiny_patch4_window7_224: " in said
    assert "mask_ratio [0.75], and this run has [0.5]" in complaint("mae", options(plain, "--mask-ratio", "0.5"))
