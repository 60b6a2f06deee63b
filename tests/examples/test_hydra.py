"""examples/hydra.py: on two processes, killed and resumed, frozen, from a folder, and with bad input."""

import math
import shutil

import pytest
import torch

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image", reason="images are decoded with Pillow")
timm = pytest.importorskip("timm")
safetensors = pytest.importorskip("safetensors.torch", reason="weights are safetensors")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this build of PyTorch has no gloo", allow_module_level=True)

from training import TINY, complaint, curve, here, in_two_processes, resumes, same_curve  # noqa: E402
from training_workers import hydra as example  # noqa: E402

import vitkernels  # noqa: E402
from vitkernels.tools.console import UserError  # noqa: E402

STEPS, SIZE, COUNT = 5, 16, 20


def options(out, *more: str) -> list[str]:
    """Return the options of a small run; of options given twice, the last counts."""
    given = ["--out", out, "--model", "vit_tiny_patch16_224", "--img-size", SIZE, "--images", COUNT, "--warm-up", 2]
    given += ["--batch-size", 8, "--micro-batch", 3, "--steps", STEPS, "--checkpoint-every", 2, "--workers", 0]
    return [*map(str, given), *TINY, *more]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of one process that nothing interrupts, of timm's own forward."""
    out = tmp_path_factory.mktemp("plain")
    here("hydra", options(out, "--no-accelerate"))
    return out


def build(out) -> example.Hydra:
    """Return the model that a run wrote."""
    kwargs = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=SIZE, **kwargs)
    model = example.Hydra(backbone, example.Shapes.num_classes, example.Shapes.mask_classes, freeze=False)
    model.load_state_dict(safetensors.load_file(out / "model.safetensors"))
    return model.eval()


def test_held_out(tmp_path, capsys):
    """What is printed of the held-out images is what the written model gives for each of them alone."""
    here("hydra", options(tmp_path, "--no-accelerate"))
    model, right, truths, predictions, errors = build(tmp_path), 0, [], [], []
    val = example.Shapes(COUNT // 10, SIZE, example.seed_of(0, 1))
    for i in range(len(val)):
        (image, mask, depth), label = val[i]
        with torch.no_grad():
            found = model((image[None] / 255 - 0.5) / 0.5)  # the mean and deviation of timm's model
        right += int(found["labels"].argmax()) == label
        truths.append(mask.flatten())
        predictions.append(found["masks"].argmax(1).flatten())
        errors.append((found["depths"][0].exp() - depth).abs() / depth)
    truth, predicted = torch.cat(truths), torch.cat(predictions)
    pairs = [(truth == k, predicted == k) for k in range(4) if (truth == k).any() or (predicted == k).any()]
    overlap = sum(float((t & p).sum() / (t | p).sum()) for t, p in pairs) / len(pairs)
    off = 100 * float(torch.stack(errors).mean())
    line = f"held out: {right} of {len(val)} labels right, mean IoU {overlap:.3f}, depth off by {off:.1f} %"
    assert line in capsys.readouterr().out
    assert curve(tmp_path)[:, 0].tolist() == [*range(1, STEPS + 1)]


def test_two_processes(plain, tmp_path):
    in_two_processes("hydra", options(tmp_path, "--micro-batch", "4"))
    same_curve(tmp_path, plain)


def test_killed_and_resumed(plain, tmp_path):
    # In step 4, of 3 parts each.
    resumes("hydra", options(tmp_path, "--no-accelerate"), tmp_path, plain, "step-00000002", 3 * 3 + 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests run the kernels")
def test_on_the_kernels(plain, tmp_path):
    pytest.importorskip("triton")
    with vitkernels.use_backend("emulated"):
        here("hydra", options(tmp_path, "--steps", "1", "--warm-up", "2"))
    torch.testing.assert_close(curve(tmp_path)[:, 1:].float(), curve(plain)[:1, 1:].float())


def test_frozen(tmp_path):
    """Only the heads learn, by the same gradients as if the backbone learned too."""
    for name, more in (("frozen", ["--freeze"]), ("whole", [])):
        here("hydra", options(tmp_path / name, "--steps", "1", "--clip", "1e9", *more))
    frozen, whole = (safetensors.load_file(tmp_path / name / "model.safetensors") for name in ("frozen", "whole"))
    torch.manual_seed(0)
    kwargs = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    first = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=SIZE, **kwargs).state_dict()
    for key, value in frozen.items():
        if key.startswith("backbone."):
            assert torch.equal(value, first[key.removeprefix("backbone.")])
            assert not torch.equal(value, whole[key])
        else:
            assert torch.equal(value, whole[key])


def test_losses_ignore_what_is_not_known():
    draw = torch.Generator().manual_seed(0)
    batch = {"masks": torch.randint(4, (2, 3, 3), generator=draw), "depths": torch.rand(2, 3, 3, generator=draw) + 1}
    labels = torch.tensor([0, 2])
    perfect = {
        "labels": 100.0 * torch.nn.functional.one_hot(labels, 3),
        "masks": 100.0 * torch.nn.functional.one_hot(batch["masks"], 4).movedim(-1, 1),
        "depths": batch["depths"].log(),
    }
    assert example.losses(perfect, batch, labels).abs().max() < 1e-5
    wrong = perfect | {"masks": -perfect["masks"], "depths": perfect["depths"] + torch.tensor(3.0)}
    got = example.losses(wrong, batch, labels)
    torch.testing.assert_close(got[2], torch.full((2,), 3.0))
    for key, nothing in (("masks", example.UNLABELLED), ("depths", 0)):
        batch[key][0] = nothing
        batch[key][1, 1:] = nothing
    got = example.losses(wrong, batch, labels)
    assert got[1, 0] == got[2, 0] == 0, "an image of which nothing is known"
    torch.testing.assert_close(got[2, 1], torch.tensor(3.0))
    torch.testing.assert_close(got[1, 1], torch.tensor(100 + math.log(3)), msg="the mean over labelled pixels")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Drawn scenes on the disk."""
    folder = tmp_path_factory.mktemp("scenes")
    shapes = example.Shapes(COUNT, SIZE, 0)
    lines = ["file,label"]
    for name in ("images", "masks", "depth"):
        (folder / name / "deeper").mkdir(parents=True)
    for i in range(COUNT):
        (image, mask, depth), label = shapes[i]
        lines.append(f"deeper/{i:02}.png,{('disc', 'square', 'triangle')[label]}")
        millimetres = (1000 * depth).round().numpy().astype(np.uint16)
        for name, pixels in (("images", image.movedim(0, -1).numpy()), ("masks", mask.numpy()), ("depth", millimetres)):
            Image.fromarray(pixels).save(folder / name / "deeper" / f"{i:02}.png")
    (folder / "labels.csv").write_text("\n".join(lines))
    return folder


def test_folder(folder, tmp_path, capsys):
    shapes, scenes = example.Shapes(COUNT, SIZE, 0), example.Scenes(folder, 4)
    for i in range(COUNT):
        (image, mask, depth), label = scenes[i]
        (wanted_image, wanted_mask, wanted_depth), wanted_label = shapes[i]
        assert torch.equal(image, wanted_image) and torch.equal(mask, wanted_mask) and label == wanted_label
        assert (depth - wanted_depth).abs().max() <= 0.00051
    here(
        "hydra", options(tmp_path, "--data", str(folder), "--val", str(folder), "--mask-classes", "4", "--workers", "1")
    )
    assert f"of {COUNT} labels right" in capsys.readouterr().out


def test_scene_is_resized_and_mirrored_as_one():
    picture = torch.arange(16, dtype=torch.uint8).view(4, 4)
    scene, mirrored = (picture.expand(3, -1, -1), picture, picture.float()), 0
    transform = example.Resized(4, flip=True)
    for seed in range(8):
        torch.manual_seed(seed)
        got = transform(scene)
        assert all(type(value) is torch.Tensor for value in got.values())
        assert torch.equal(got["images"], got["masks"].expand(3, -1, -1)) and torch.equal(got["masks"], got["depths"])
        mirrored += not torch.equal(got["masks"], picture)
    assert 0 < mirrored < 8
    got = example.Resized(8, flip=False)(scene)
    assert torch.equal(got["masks"], picture.repeat_interleave(2, 0).repeat_interleave(2, 1)), "classes do not mix"
    assert got["images"].shape == (3, 8, 8) and got["depths"].unique().tolist() == [*range(16)]


def test_bad_scenes(folder, tmp_path):
    scenes = tmp_path / "scenes"
    shutil.copytree(folder, scenes)
    of_mask, of_depth = (scenes / name / "deeper" / "00.png" for name in ("masks", "depth"))

    def said() -> str:
        with pytest.raises(UserError) as refused:
            example.Scenes(scenes, 4)[0]
        return str(refused.value)

    Image.fromarray(np.full((SIZE, SIZE), 4, dtype=np.uint8)).save(of_mask)
    assert said() == f"{of_mask} holds class 4; --mask-classes says 0 to 3"
    Image.fromarray(np.zeros((SIZE, 5), dtype=np.uint8)).save(of_mask)
    assert f"{of_mask} has ({SIZE}, 5) pixels" in said()
    of_mask.write_bytes(of_depth.read_bytes())
    assert f"{of_mask} is of mode I;16; expected L or P" in said()
    of_mask.write_bytes(of_depth.read_bytes()[:100])
    assert str(of_mask) in said()
    of_mask.unlink()
    assert f"there is no {of_mask}" in said()
    with pytest.raises(UserError, match="has the label 'disc', which is not among"):
        example.Scenes(folder, 4, names=["square", "triangle"])
    for text, why in (
        ("file,label\n", "names no images"),
        ("file,label\na\n", "names no images, or has a line"),
        ("name,class\na,b\n", "has no columns file and label"),
    ):
        (scenes / "labels.csv").write_text(text)
        assert f"{scenes / 'labels.csv'} {why}" in said()


def test_bad_input(plain, tmp_path):
    nothing = tmp_path / "nothing"
    assert f"cannot read {nothing / 'labels.csv'}: No such file" in complaint(
        "hydra", options(tmp_path, "--data", str(nothing))
    )
    other = options(tmp_path, "--model", "test_resnet", "--model-kwargs", "drop_rate=0.1")
    assert "test_resnet cannot be built: " in complaint("hydra", other)
    assert "steps 5, and this run has 6" in complaint("hydra", options(plain, "--steps", "6"))
