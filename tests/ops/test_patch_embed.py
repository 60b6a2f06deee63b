"""patch_embed against fp64: dtypes, patches, layouts, position and prefix tokens, gradients, bad input."""

import sys

import pytest
import torch
from drawn import drawn

from vitkernels import ops, reference
from vitkernels.ops._patch_embed.config import SUMMED, choose_config
from vitkernels.ops._patch_embed.pixels import reciprocal
from vitkernels.ops._triton import tl
from vitkernels.runtime import DeviceFacts
from vitkernels.testing import check_op

FILE = sys.modules["vitkernels.ops._patch_embed"]  # the package's attribute of that name is the function
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
H200 = DeviceFacts("h200", "sm_90", 132, 227 << 10)
USUAL = (2, (12, 8), (4, 4), 36)  # images, their size, the patches' and the channels, where they are not the subject
SMALL = (2, (2, 4), (1, 2), 3)  # where it is fp64


def make(*shape, dtype=torch.float32, device="cpu", grad=True):
    return torch.randn(*shape, dtype=torch.float64).to(device, dtype).requires_grad_(grad)


def inputs(B, image, patch, C, *, R=1, channels=3, pos_prefix=True, **kind):
    """All five tensors for ``image`` and ``patch``, each (height, width), with weights of a trained scale."""
    N = (image[0] // patch[0]) * (image[1] // patch[1])
    weight = make(C, channels, *patch, **kind).detach() / (channels * patch[0] * patch[1]) ** 0.5
    tensors = {"images": make(B, channels, *image, **kind), "weight": weight.requires_grad_(), "bias": make(C, **kind)}
    tensors["pos_embed"] = make(1, R + N if pos_prefix else N, C, **kind)
    tensors["prefix_tokens"] = make(1, R, C, **kind) if R else None
    return tensors


def leaf(x):
    return x.detach().requires_grad_()


SHAPES = {
    "N=50": (2, (10, 5), (1, 1), 33, 0, 2),
    "N=196": (1, (224, 224), (16, 16), 72, 1, 3),
    "N=256, registers": (1, (224, 224), (14, 14), 48, 5, 3),
    "many images of one patch": (300, (2, 2), (2, 2), 17, 1, 1),
    "patch 32": (1, (64, 32), (32, 32), 36, 1, 3),
    "oblong patch and image": (2, (6, 35), (3, 7), 150, 1, 3),
    "one channel": (1, (6, 6), (3, 3), 1, 1, 1),
}


@pytest.mark.parametrize(("shape", "dtype"), drawn(len(SHAPES), SHAPES, DTYPES), ids=str)
def test_patch_embed(shape, dtype, device):
    B, image, patch, C, R, channels = SHAPES[shape]
    tensors = inputs(B, image, patch, C, R=R, channels=channels, dtype=dtype, device=device)
    check_op(ops.patch_embed, reference.patch_embed, tensors)


def test_position_on_the_patches_alone(device):
    tensors = inputs(*USUAL, pos_prefix=False, device=device)
    check_op(ops.patch_embed, reference.patch_embed, tensors, options={"pos_embed_prefix": False})


@pytest.mark.parametrize("given", ["bias", "pos_embed", "prefix_tokens", ""])
def test_optional_inputs_may_be_missing(given, device):
    tensors = inputs(*USUAL, R=1 if given == "prefix_tokens" else 0, device=device)
    for name in ("bias", "pos_embed", "prefix_tokens"):
        tensors[name] = tensors[name] if name == given else None
    check_op(ops.patch_embed, reference.patch_embed, tensors)


def test_position_and_prefix_without_a_batch_dim(device):
    tensors = inputs(*USUAL, device=device)
    for name in ("pos_embed", "prefix_tokens"):
        tensors[name] = leaf(tensors[name][0])
    check_op(ops.patch_embed, reference.patch_embed, tensors)
    tensors["pos_embed"], tensors["prefix_tokens"] = leaf(tensors["pos_embed"][1:]), leaf(tensors["prefix_tokens"][:0])
    check_op(ops.patch_embed, reference.patch_embed, tensors)


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "x and y swapped": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "last dim strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded over the batch": lambda x: x[:1].expand_as(x),
    "cropped": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 4))[..., 1:-4, 3:-2],
    "cropped, channels last": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 4)).contiguous(
        memory_format=torch.channels_last
    )[..., 1:-4, 3:-2],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize(
    ("layout", "reach"), [(layout, "int64" if layout == "cropped, channels last" else "int32") for layout in LAYOUTS]
)
def test_layouts_of_images_and_weight(layout, reach, device, monkeypatch):
    if reach == "int64":  # the offsets that only images beyond 2³⁰ elements need
        options = FILE.forward.launch_options
        for file in (FILE.forward, FILE.backward):
            monkeypatch.setattr(file, "launch_options", lambda *a: options(*a) | {"INDEX": tl.int64})
    strided = LAYOUTS[layout]
    tensors = inputs(*USUAL, device=device)
    tensors |= {name: leaf(strided(tensors[name].detach())) for name in ("images", "weight")}
    check_op(ops.patch_embed, reference.patch_embed, tensors)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_image_gradients_keep_the_memory_format(memory_format, device):
    tensors = inputs(*USUAL, device=device)
    for name in ("images", "weight"):
        tensors[name] = leaf(tensors[name].detach().contiguous(memory_format=memory_format))
    out = ops.patch_embed(**tensors)
    (dimages,) = torch.autograd.grad(out, tensors["images"], torch.ones_like(out))
    assert dimages.is_contiguous(memory_format=memory_format)


UPSTREAMS = {
    "stride 0": lambda y: y.new_ones(()).expand_as(y),
    "transposed": lambda y: torch.randn_like(y.transpose(1, 2)).transpose(1, 2).contiguous().mT.contiguous().mT,
    "last dim strided": lambda y: torch.randn(*y.shape, 2, device=y.device)[..., 1],
    "part of a cat": lambda y: torch.randn(y.shape[0], y.shape[1] + 2, y.shape[2], device=y.device)[:, 2:],
}


@pytest.mark.parametrize("layout", UPSTREAMS)
def test_layouts_of_the_upstream_gradient(layout, device):
    tensors = inputs(*USUAL, device=device)
    check_op(ops.patch_embed, reference.patch_embed, tensors, upstream=UPSTREAMS[layout])


NORMALIZE = ((0.485, 0.456, 0.406, 0.3), (0.229, 0.224, 0.225, 0.01))  # ImageNet's, and a narrow fourth channel


def pixels(B, channels, image, dtype=torch.uint8, device="cpu"):
    """Images of 0..255, or for a floating dtype of 0..1, and the options that normalise them."""
    images = torch.randint(0, 256, (B, channels, *image), dtype=torch.uint8).to(device)
    mean, std = (values[:channels] for values in NORMALIZE)
    return images if dtype == torch.uint8 else images.to(dtype) / 255, {"normalize": (mean, std)}


PATCHES = [(14, 14), (16, 16), (3, 7), (16, 8)]


@pytest.mark.parametrize(("patch", "image_dtype", "dtype"), drawn(4, PATCHES, ["uint8", "same"], DTYPES), ids=str)
def test_normalize(patch, image_dtype, dtype, device):
    """Behind two prefix tokens, which have no position."""
    size = (2 * patch[0], 3 * patch[1])
    tensors = inputs(2, size, patch, 36, R=2, pos_prefix=False, dtype=dtype, device=device)
    image_dtype = dtype if image_dtype == "same" else torch.uint8
    images, options = pixels(2, 3, tensors.pop("images").shape[2:], image_dtype, device)
    options["pos_embed_prefix"] = False
    if image_dtype == torch.uint8:
        options["images"] = images  # check_op would make the truth's images fp64
    else:
        tensors["images"] = leaf(images)
    check_op(ops.patch_embed, reference.patch_embed, tensors, options=options)


@pytest.mark.parametrize(
    ("memory_format", "channels"), [(torch.contiguous_format, 1), (torch.channels_last, 4)], ids=str
)
def test_normalize_each_channel_by_its_own(memory_format, channels, device):
    tensors = inputs(*USUAL, channels=channels, pos_prefix=False, device=device)
    del tensors["images"]
    images, options = pixels(2, channels, (12, 8), device=device)
    options |= {"images": images.contiguous(memory_format=memory_format), "pos_embed_prefix": False}
    check_op(ops.patch_embed, reference.patch_embed, tensors, options=options)


@pytest.mark.parametrize(
    ("image_dtype", "weight_dtype"), [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_normalized_images_take_the_weights_dtype(image_dtype, weight_dtype, device):
    tensors = inputs(*USUAL, dtype=weight_dtype, device=device)
    images, options = pixels(2, 3, (12, 8), image_dtype, device)
    check_op(ops.patch_embed, reference.patch_embed, tensors | {"images": leaf(images)}, options=options)


def test_normalize_is_what_torchvision_makes_of_a_decoded_image(device):
    transforms = pytest.importorskip("torchvision.transforms")
    decoded = torch.randint(0, 256, (12, 8, 3), dtype=torch.uint8).numpy()
    make_input = transforms.Compose([transforms.ToTensor(), transforms.Normalize(*(v[:3] for v in NORMALIZE))])
    tensors = inputs(1, (12, 8), (4, 4), 36, device=device, grad=False) | {
        "images": make_input(decoded)[None].to(device)
    }
    expected = reference.patch_embed(**tensors)
    for images in (torch.from_numpy(decoded).permute(2, 0, 1)[None], transforms.ToTensor()(decoded)[None]):
        tensors["images"] = images.to(device)
        out = ops.patch_embed(**tensors, normalize=tuple(v[:3] for v in NORMALIZE))
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["channels last", "misaligned"])
def test_layouts_of_uint8_images(layout, device):
    tensors = inputs(*USUAL, device=device)
    del tensors["images"]
    images, options = pixels(2, 3, (12, 8), device=device)
    options["images"] = LAYOUTS[layout](images)
    assert options["images"].dtype == torch.uint8
    check_op(ops.patch_embed, reference.patch_embed, tensors, options=options)


@pytest.mark.parametrize(
    ("dtype", "image_dtype"), [(torch.float16, torch.uint8), (torch.bfloat16, torch.float32)], ids=str
)
def test_normalize_under_autocast(dtype, image_dtype, device):
    tensors = inputs(*USUAL, device=device)
    images, options = pixels(2, 3, (12, 8), image_dtype, device)

    def autocast(function):
        def call(**tensors):
            with torch.autocast(device.type, dtype=dtype, enabled=tensors["weight"].dtype != torch.float64):
                return function(**(tensors | {"images": images}))

        return call

    check_op(autocast(ops.patch_embed), autocast(reference.patch_embed), tensors | {"images": None}, options=options)


@pytest.mark.parametrize(("image_dtype", "pos_prefix"), [(torch.uint8, True), (torch.float64, False)], ids=str)
def test_gradcheck_normalized(image_dtype, pos_prefix, device):
    tensors = inputs(*SMALL, channels=2, pos_prefix=pos_prefix, dtype=torch.float64, device=device)
    images, options = pixels(2, 2, (2, 4), image_dtype, device)
    options["pos_embed_prefix"] = pos_prefix
    if image_dtype != torch.uint8:
        images.requires_grad_()

    def embed(images, weight, bias, pos_embed, prefix_tokens):
        return ops.patch_embed(images, weight, bias, pos_embed=pos_embed, prefix_tokens=prefix_tokens, **options)

    assert torch.autograd.gradcheck(embed, [images, *(tensors[name] for name in ORDER[1:])], eps=1e-6)


def test_fp32_products_of_narrow_images_are_exact_on_blackwell(device, monkeypatch):
    """There Triton would take them for TF32: the kernels are handed fp32, whatever the images are in."""
    facts = DeviceFacts("b200", "sm_100", 148, 227 << 10)
    monkeypatch.setattr(FILE.runtime, "device_facts", lambda device: facts)
    handed = []
    for file in (FILE.forward, FILE.backward):
        order = file.in_pixel_order
        monkeypatch.setattr(file, "in_pixel_order", lambda x, w, order=order: handed.append(x.dtype) or order(x, w))
    for dtype, expected in ((torch.float32, torch.float32), (torch.bfloat16, torch.uint8)):
        tensors = inputs(*USUAL, dtype=dtype, device=device)
        del tensors["images"]
        images, options = pixels(2, 3, (12, 8), device=device)
        check_op(ops.patch_embed, reference.patch_embed, tensors, options=options | {"images": images})
        assert handed == [expected] * 2  # forward, and backward of the weight
        handed.clear()


def test_uint8_images_are_saved_as_they_are(device, computed_by_pytorch):
    tensors = inputs(*USUAL, device=device)
    tensors["images"], options = pixels(2, 3, (12, 8), device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.patch_embed(**tensors, **options)
    assert [t.dtype for t in saved] == [torch.uint8, torch.float32]


def test_empty_batch_gives_zero_gradients(device):
    tensors = inputs(0, (12, 8), (4, 4), 36, device=device)
    out = ops.patch_embed(**tensors)
    out.sum().backward()
    assert out.shape == (0, 7, 36)
    for name, t in tensors.items():
        assert torch.equal(t.grad, torch.zeros_like(t)), name


ORDER = ["images", "weight", "bias", "pos_embed", "prefix_tokens"]


@pytest.mark.parametrize("frozen", ORDER)
def test_frozen_inputs_cost_nothing(frozen, device, monkeypatch):
    tensors = inputs(*USUAL, device=device)
    tensors[frozen].requires_grad_(False)
    check_op(ops.patch_embed, reference.patch_embed, tensors)
    flags = []
    backward = FILE._patch_embed_bwd
    monkeypatch.setattr(FILE, "_patch_embed_bwd", lambda *a: flags.append(a[3:5]) or backward(*a))
    ops.patch_embed(**tensors).sum().backward()
    assert flags == [(frozen != "images", frozen != "weight")]
    assert tensors[frozen].grad is None


def test_only_tokens_to_train_launches_no_backward_and_saves_nothing(device, monkeypatch):
    tensors = inputs(*USUAL, device=device)
    for name in ("images", "weight"):
        tensors[name].requires_grad_(False)
    monkeypatch.setattr(FILE, "_patch_embed_bwd", None)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        out = ops.patch_embed(**tensors)
    out.sum().backward()
    assert saved == [] and tensors["prefix_tokens"].grad.isfinite().all()


def test_gradcheck(device):
    tensors = inputs(*SMALL, channels=2, dtype=torch.float64, device=device)

    def embed(images, weight, bias, pos_embed, prefix_tokens):
        return ops.patch_embed(images, weight, bias, pos_embed=pos_embed, prefix_tokens=prefix_tokens)

    assert torch.autograd.gradcheck(embed, [tensors[name] for name in ORDER], eps=1e-6)


@pytest.mark.parametrize(
    ("wide", "dtype"),
    [
        ("all", torch.float16),
        ("images", torch.float16),
        ("pos_embed", torch.bfloat16),
        ("prefix_tokens", torch.bfloat16),
    ],
    ids=str,
)
def test_autocast(wide, dtype, device):
    tensors = inputs(*USUAL, device=device)
    for name in ORDER:
        if wide not in ("all", name):
            tensors[name] = leaf(tensors[name].to(dtype))

    def autocast(function):
        def call(**tensors):
            # The truth is fp64 without autocast, which would compute the epilogue's dtypes otherwise.
            with torch.autocast(device.type, dtype=dtype, enabled=tensors["images"].dtype != torch.float64):
                return function(**tensors)

        return call

    check_op(autocast(ops.patch_embed), autocast(reference.patch_embed), tensors)
    with torch.no_grad():
        out = autocast(ops.patch_embed)(**tensors)
        assert out.dtype == autocast(reference.patch_embed)(**tensors).dtype


def test_autocast_leaves_fp64_alone(device, computed_by_pytorch):
    tensors = inputs(2, (4, 4), (2, 2), 5, dtype=torch.float64, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = ops.patch_embed(**tensors)
        expected = reference.patch_embed(**tensors)
    assert out.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_pixel_stays_in_its_patch(value, device):
    tensors = inputs(*USUAL, device=device)
    with torch.no_grad():
        tensors["images"][1, 2, 5, 6] = value  # patch (1, 1), the fourth, behind one prefix token
        out = ops.patch_embed(**tensors)
        bad = ~out.isfinite().all(-1)
        assert bad.nonzero().tolist() == [[1, 4]]
        dout = torch.zeros_like(out)
    dout[1, 4, 0] = value
    (dimages,) = torch.autograd.grad(ops.patch_embed(**tensors), tensors["images"], dout)
    bad = (~dimages.isfinite()).nonzero()
    assert bad[:, 0].unique().tolist() == [1]
    assert (bad[:, 2:].amin(0).tolist(), bad[:, 2:].amax(0).tolist()) == ([4, 4], [7, 7])


def test_a_bad_weight_leaves_the_prefix_alone(device):
    tensors = inputs(*USUAL, device=device)
    with torch.no_grad():
        tensors["weight"].fill_(float("nan"))
        out = ops.patch_embed(**tensors)
    assert out[:, 1:].isnan().all()
    assert torch.equal(out[:, :1], (tensors["prefix_tokens"] + tensors["pos_embed"][:, :1]).expand(2, -1, -1))


@pytest.mark.parametrize("normalized", [False, True])
def test_reruns_are_bit_equal(normalized, device):
    tensors = inputs(20, (14, 14), (2, 2), 40, dtype=torch.bfloat16, device=device)
    options = {}
    if normalized:
        tensors["images"], options = pixels(20, 3, (14, 14), device=device)
    leaves = [tensors[name] for name in ORDER if tensors[name].requires_grad]
    runs = []
    for _ in range(2):
        out = ops.patch_embed(**tensors, **options)
        runs.append([out, *torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view_as(out).to(out))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


X, W = torch.zeros(2, 3, 8, 12), torch.zeros(6, 3, 4, 4)
N = 6


def normalized(images=None, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)):
    return ops.patch_embed(X.byte() if images is None else images, W, normalize=(mean, std))


BAD = {
    "uint8": (lambda: ops.patch_embed(X.byte(), W), TypeError, r"images has dtype torch.uint8.*normalize=\(mean, std"),
    "integer to normalise": (lambda: normalized(X.int()), TypeError, "int32; expected uint8, float16"),
    "sparse uint8": (lambda: normalized(X.byte().to_sparse()), NotImplementedError, "sparse"),
    "rank of uint8": (lambda: normalized(X.byte()[0]), ValueError, r"images have shape \(3, 8, 12\)"),
    "few means": (lambda: normalized(mean=[0.5]), ValueError, "1 means and 3 standard deviations; expected 3 of each"),
    "many deviations": (lambda: normalized(std=[0.5] * 4), ValueError, "3 means and 4 standard deviations"),
    "no deviation": (lambda: normalized(std=[0.5, 0.0, 0.5]), ValueError, "standard deviations above 0"),
    "negative deviation": (lambda: normalized(std=[0.5, -0.1, 0.5]), ValueError, "standard deviations above 0"),
    "infinite deviation": (lambda: normalized(std=[0.5, float("inf"), 0.5]), ValueError, "finite numbers"),
    "NaN mean": (lambda: normalized(mean=[0.5, float("nan"), 0.5]), ValueError, "finite numbers"),
    "scalar mean": (lambda: normalized(mean=0.5), TypeError, "expected two sequences of numbers"),
    "strings": (lambda: normalized(mean="abc"), TypeError, "expected two sequences of numbers"),
    "mean alone": (lambda: ops.patch_embed(X, W, normalize=([0.5] * 3,)), TypeError, "expected two sequences"),
    "normalize is no pair": (lambda: ops.patch_embed(X, W, normalize=True), TypeError, "normalize is True"),
    "normalized bias dtype": (
        lambda: ops.patch_embed(X.byte(), W, torch.zeros(6).half(), normalize=([0.5] * 3, [0.5] * 3)),
        TypeError,
        "bias has dtype torch.float16, weight has torch.float32",
    ),
    "integer": (lambda: ops.patch_embed(X.int(), W), TypeError, "int32"),
    "complex": (lambda: ops.patch_embed(X.cfloat(), W), TypeError, "complex64"),
    "no tensor": (lambda: ops.patch_embed([1.0], W), TypeError, "images is a list"),
    "sparse": (lambda: ops.patch_embed(X.to_sparse(), W), NotImplementedError, "sparse"),
    "rank": (lambda: ops.patch_embed(X[0], W), ValueError, r"images have shape \(3, 8, 12\); expected \(batch"),
    "channels": (lambda: ops.patch_embed(X[:, :1], W), ValueError, "images have 1 channels; expected 3"),
    "height": (lambda: ops.patch_embed(X[:, :, :7], W), ValueError, "images of 7×12 pixels do not divide.*4×4"),
    "width": (lambda: ops.patch_embed(X[..., :11], W), ValueError, "images of 8×11 pixels do not divide.*4×4"),
    "no height": (lambda: ops.patch_embed(X[:, :, :0], W), ValueError, "images of 0×12 pixels"),
    "no width": (lambda: ops.patch_embed(X[..., :0], W), ValueError, "images of 8×0 pixels"),
    "weight rank": (lambda: ops.patch_embed(X, W.flatten(1)), ValueError, r"weight has shape \(6, 48\); expected a"),
    "no channels": (lambda: ops.patch_embed(X[:, :0], W[:, :0]), ValueError, r"weight has shape \(6, 0, 4, 4\)"),
    "no width of weight": (lambda: ops.patch_embed(X, W[:0]), ValueError, r"weight has shape \(0, 3, 4, 4\)"),
    "no patch": (lambda: ops.patch_embed(X, W[:, :, :0]), ValueError, r"weight has shape \(6, 3, 0, 4\)"),
    "weight dtype": (lambda: ops.patch_embed(X, W.half()), TypeError, "images have dtype torch.float32, weight has"),
    "weight device": (lambda: ops.patch_embed(X, W.to("meta")), ValueError, "weight is on meta, images on cpu"),
    "bias width": (lambda: ops.patch_embed(X, W, torch.zeros(5)), ValueError, r"bias has shape \(5,\); expected \(6,"),
    "bias dtype": (lambda: ops.patch_embed(X, W, torch.zeros(6).half()), TypeError, "bias has dtype torch.float16"),
    "position length": (
        lambda: ops.patch_embed(X, W, pos_embed=torch.zeros(1, N, 6), prefix_tokens=torch.zeros(1, 1, 6)),
        ValueError,
        r"pos_embed has shape \(1, 6, 6\); expected \(1, 7, 6\), 1 prefix tokens and 6 patches",
    ),
    "position length without prefix": (
        lambda: ops.patch_embed(
            X, W, pos_embed=torch.zeros(1, 7, 6), prefix_tokens=torch.zeros(1, 1, 6), pos_embed_prefix=False
        ),
        ValueError,
        r"pos_embed has shape \(1, 7, 6\); expected \(1, 6, 6\), 6 patches",
    ),
    "position width": (lambda: ops.patch_embed(X, W, pos_embed=torch.zeros(1, N, 5)), ValueError, "weight's 6 chan"),
    "position batch": (lambda: ops.patch_embed(X, W, pos_embed=torch.zeros(2, N, 6)), ValueError, r"\(2, 6, 6\)"),
    "position rank": (lambda: ops.patch_embed(X, W, pos_embed=torch.zeros(6)), ValueError, r"pos_embed has shape \(6"),
    "position dtype": (
        lambda: ops.patch_embed(X.half(), W.half(), pos_embed=torch.zeros(1, N, 6)),
        TypeError,
        "pos_embed has dtype torch.float32, weight has torch.float16",
    ),
    "prefix width": (lambda: ops.patch_embed(X, W, prefix_tokens=torch.zeros(1, 1, 7)), ValueError, "prefix_tokens"),
    "prefix batch": (lambda: ops.patch_embed(X, W, prefix_tokens=torch.zeros(2, 1, 6)), ValueError, r"\(2, 1, 6\)"),
    "prefix dtype": (lambda: ops.patch_embed(X, W, prefix_tokens=torch.zeros(1, 6).half()), TypeError, "prefix_tokens"),
    "prefix device": (
        lambda: ops.patch_embed(X, W, prefix_tokens=torch.zeros(1, 6, device="meta")),
        ValueError,
        "prefix_tokens is on meta",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, no_launch):
    call, error, message = BAD[case]
    with pytest.raises(error, match=f"^patch_embed: .*{message}"):
        call()


def test_double_backward_and_forward_mode_are_errors(device, computed_by_pytorch):
    x, w = make(1, 3, 4, 4, device=device), make(5, 3, 2, 2, device=device)
    (dx,) = torch.autograd.grad(ops.patch_embed(x, w).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        dx.sum().backward()
    x, w = x.detach(), w.detach()
    for transform in (
        lambda: torch.func.jvp(lambda x: ops.patch_embed(x, w), (x,), (x,)),
        lambda: torch.func.grad(lambda x: ops.patch_embed(x, w).sum())(x),
        lambda: torch.vmap(lambda x: ops.patch_embed(x, w))(x[None]),
    ):
        with pytest.raises(RuntimeError, match="setup_context"):
            transform()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        ops.patch_embed(torch.autograd.forward_ad.make_dual(x, x), w)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck(memory_format, device):
    tensors = inputs(*USUAL, device=device)
    images, weight, bias, pos_embed, prefix = (
        t.detach().contiguous(memory_format=memory_format) if t.ndim == 4 else t.detach() for t in tensors.values()
    )
    forward, backward = torch.ops.vitkernels.patch_embed_fwd, torch.ops.vitkernels.patch_embed_bwd
    torch.library.opcheck(forward, (images, weight, bias, pos_embed, prefix, True, None, torch.float32))
    dout = torch.randn(2, 7, 36, device=device)
    torch.library.opcheck(backward, (dout, images, weight, True, True))
    if memory_format == torch.channels_last:
        return
    for needed in ((True, False), (False, True)):
        torch.library.opcheck(backward, (dout, images, weight, *needed))
    images, options = pixels(2, 3, (12, 8), device=device)
    constants = [number for values in options["normalize"] for number in values]
    torch.library.opcheck(forward, (images, weight, bias, pos_embed, prefix, True, constants, torch.float32))
    torch.library.opcheck(backward, (dout, images, weight, False, True, constants))


def test_the_cpu_implementations_agree_with_the_kernels():
    tensors = inputs(*SMALL, channels=2, dtype=torch.float64)
    images, weight, bias, pos_embed, prefix = (t.detach() for t in tensors.values())
    for forward_args in (
        (images, weight, bias, pos_embed, prefix, True, None, torch.float64),
        (images, weight, None, pos_embed[:, 1:], prefix, False, None, torch.float64),
    ):
        torch.testing.assert_close(FILE._reference_forward(*forward_args), FILE._patch_embed_fwd(*forward_args))
    for needed in ((True, True), (True, False), (False, True)):
        args = (torch.randn(2, 5, 3, dtype=torch.float64), images, weight, *needed)
        for a, b in zip(FILE._reference_backward(*args), FILE._patch_embed_bwd(*args), strict=True):
            torch.testing.assert_close(a, b)
    for image_dtype in (torch.uint8, torch.float64):
        images, options = pixels(2, 2, (2, 4), image_dtype)
        constants = [number for values in options["normalize"] for number in values]
        args = (images, weight, bias, pos_embed, prefix, True, constants, torch.float64)
        torch.testing.assert_close(FILE._reference_forward(*args), FILE._patch_embed_fwd(*args))
        args = (
            torch.randn(2, 5, 3, dtype=torch.float64),
            images,
            weight,
            image_dtype != torch.uint8,
            True,
            constants,
        )
        for a, b in zip(FILE._reference_backward(*args), FILE._patch_embed_bwd(*args), strict=True):
            torch.testing.assert_close(a, b)


def test_configs_fit_the_device_and_splits_do_not_grow_with_the_batch():
    small = DeviceFacts("small", "sm_120", 170, 99 << 10)
    for M, C, K in ((197, 768, 768), (6304, 768, 768), (50_432, 1024, 588), (1, 1, 1), (10_952, 1536, 588)):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            for product in SUMMED:
                for facts in (H200, small):
                    for image_dtype in (dtype, torch.promote_types(dtype, torch.float32)):
                        config = choose_config(product, M, C, K, dtype, facts, image_dtype=image_dtype)
                        blocks = [config.block_m, config.block_c, config.block_k]
                        assert all(block >= 16 and block & (block - 1) == 0 for block in blocks)
                        summed = blocks.pop("mck".index(SUMMED[product]))
                        assert config.num_stages * summed * sum(blocks) * image_dtype.itemsize <= facts.shared_memory
    shares = [choose_config("dweight", M, 768, 768, torch.bfloat16, H200).splits for M in (64, 6272, 10**6, 10**8)]
    assert shares[0] == 1 and shares[-1] == shares[-2] <= 2 * H200.num_sms


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 14, 16, 37, 196, 729, 1369, 2**16 + 1, 2**30 - 35, 2**30])
def test_rows_are_divided_exactly(divisor):
    """As the kernel divides them: in 32 bits, by a multiplication."""
    factor, shift = reciprocal(divisor)
    assert 2**31 <= factor < 2**32, "the JIT compiles a smaller factor as another type"
    multiples = range(0, 2**31, max(divisor, 2**31 // divisor // 999 * divisor))
    for n in {n for m in (*multiples, 2**31) for n in (m - 1, m, m + 1) if 0 <= n < 2**31}:
        assert 2 * n * factor >> 32 >> shift == n // divisor


def test_gradients_share_no_memory(device):
    tensors = inputs(*USUAL, device=device)
    for name in ("images", "weight"):
        tensors[name].requires_grad_(False)
    pos, cls = tensors["pos_embed"], tensors["prefix_tokens"]
    for _ in range(2):  # the second adds in place to what the first left
        ops.patch_embed(**tensors).sum().backward()
    torch.testing.assert_close(cls.grad, torch.full_like(cls, 4.0), rtol=0, atol=0)
    torch.testing.assert_close(pos.grad, torch.full_like(pos, 4.0), rtol=0, atol=0)
    assert cls.grad.untyped_storage().data_ptr() != pos.grad.untyped_storage().data_ptr()
