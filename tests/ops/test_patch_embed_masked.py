"""patch_embed as masked image modelling uses it: mask tokens (BEiT), and rows of visible patches alone (MAE)."""

import pytest
import torch
from drawn import drawn
from test_patch_embed import LAYOUTS, SMALL, inputs, leaf, make, pixels

from vitkernels import ops, reference
from vitkernels.testing import check_op

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WHOLE = (3, (12, 8), (4, 4), 36)  # 6 patches an image


def masked(B, image, patch, C, *, share=0.5, **kind):
    """Tensors with a mask token, and a mask of so large a share."""
    device = kind.get("device", "cpu")
    tensors = inputs(B, image, patch, C, **kind)
    tensors["mask_token"] = make(C, dtype=kind.get("dtype", torch.float32), device=device)
    N = (image[0] // patch[0]) * (image[1] // patch[1])
    return tensors, {"mask": (torch.rand(B, N) < share).to(device)}


def visible(B, N, V, device, dtype=torch.int64):
    return torch.rand(B, N).argsort(1)[:, :V].to(device, dtype)


@pytest.mark.parametrize(("R", "pos_prefix", "dtype"), drawn(3, [0, 1, 3], [True, False], DTYPES), ids=str)
def test_mask_tokens(R, pos_prefix, dtype, device):
    tensors, options = masked(*WHOLE, R=R, pos_prefix=pos_prefix, dtype=dtype, device=device)
    options["pos_embed_prefix"] = pos_prefix
    check_op(ops.patch_embed, reference.patch_embed, tensors, options=options)


@pytest.mark.parametrize(("R", "pos_prefix", "dtype"), drawn(3, [0, 1, 3], [True, False], DTYPES), ids=str)
def test_visible_patches(R, pos_prefix, dtype, device):
    tensors = inputs(*WHOLE, R=R, pos_prefix=pos_prefix, dtype=dtype, device=device)
    options = {"visible": visible(3, 6, 4, device), "pos_embed_prefix": pos_prefix}
    check_op(ops.patch_embed, reference.patch_embed, tensors, options=options)


@pytest.mark.parametrize("given", ["bias", "pos_embed", "prefix_tokens", ""])
@pytest.mark.parametrize("kind", ["mask", "visible"])
def test_optional_inputs_may_be_missing(kind, given, device, computed_by_pytorch):
    tensors, options = masked(*WHOLE, R=1 if given == "prefix_tokens" else 0, device=device)
    if kind == "visible":
        del tensors["mask_token"]
        options = {"visible": visible(3, 6, 4, device)}
    for name in ("bias", "pos_embed", "prefix_tokens"):
        tensors[name] = tensors[name] if name == given else None
    check_op(ops.patch_embed, reference.patch_embed, tensors, options=options)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_patch_or_every_patch_masked(share, device):
    tensors, options = masked(*WHOLE, share=share, device=device)
    out = ops.patch_embed(**tensors, **options)
    if share == 0.0:
        expected = ops.patch_embed(**{name: t for name, t in tensors.items() if name != "mask_token"})
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
    grads = torch.autograd.grad(out.square().sum(), [tensors[name] for name in ("images", "weight", "mask_token")])
    assert [bool(g.any()) for g in grads] == ([True, True, False] if share == 0.0 else [False, False, True])


def test_visible_patches_are_those_rows_of_all(device):
    tensors = inputs(*WHOLE, device=device, grad=False)
    chosen = visible(3, 6, 6, device)
    everything = ops.patch_embed(**tensors)
    rows = torch.cat([torch.zeros_like(chosen[:, :1]), 1 + chosen], 1)
    expected = everything.gather(1, rows.unsqueeze(-1).expand(-1, -1, 36))
    out = ops.patch_embed(**tensors, visible=chosen)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert torch.equal(ops.patch_embed(**tensors, visible=chosen[:, :2]), out[:, :3])


def test_no_visible_patch_and_no_image(device):
    tensors = inputs(*WHOLE, device=device)
    out = ops.patch_embed(**tensors, visible=visible(3, 6, 0, device))
    assert out.shape == (3, 1, 36)
    grads = torch.autograd.grad(out.sum(), list(tensors.values()))
    assert [bool(g.any()) for g in grads] == [False, False, False, True, True]
    empty = tensors | {"images": tensors["images"][:0]}
    assert ops.patch_embed(**empty, visible=visible(0, 6, 2, device)).shape == (0, 3, 36)
    mask = torch.zeros(0, 6, dtype=torch.bool, device=device)
    assert ops.patch_embed(**empty, mask=mask, mask_token=make(36, device=device)).shape == (0, 7, 36)


@pytest.mark.parametrize("kind", ["mask", "visible"])
def test_pixels_of_hidden_patches_are_not_read(kind, device):
    """NaN in them comes nowhere, neither forward nor backward, with normalisation and without."""
    tensors, options = masked(1, (4, 8), (4, 4), 36, device=device)
    options["mask"] = torch.tensor([[True, False]], device=device)
    if kind == "visible":
        del tensors["mask_token"]
        options = {"visible": torch.tensor([[1]], device=device)}
    images = tensors["images"].detach().clone()
    images[..., :4] = float("nan")
    tensors["images"] = leaf(images)
    given = [t for t in tensors.values() if t is not None]
    for more in ({}, {"normalize": ((0.5,) * 3, (0.2,) * 3)}):
        out = ops.patch_embed(**tensors, **options, **more)
        grads = torch.autograd.grad(out.sum(), given)
        assert all(t.isfinite().all() for t in (out, *grads))
        assert not grads[0][..., :4].any() and grads[0][..., 4:].all()


@pytest.mark.parametrize("kind", ["mask", "visible"])
def test_normalised_uint8_images(kind, device):
    tensors, options = masked(*WHOLE, R=2, pos_prefix=False, dtype=torch.bfloat16, device=device)
    del tensors["images"]
    images, more = pixels(3, 3, (12, 8), device=device)
    if kind == "visible":
        del tensors["mask_token"]
        options = {"visible": visible(3, 6, 4, device, torch.int32)}
    options |= more | {"images": images, "pos_embed_prefix": False}
    check_op(ops.patch_embed, reference.patch_embed, tensors, options=options)


@pytest.mark.parametrize("layout", ["channels last", "expanded over the batch"])
def test_layouts(layout, device, computed_by_pytorch):
    tensors, options = masked(*WHOLE, device=device)
    tensors["images"] = leaf(LAYOUTS[layout](tensors["images"].detach()))
    options["mask"] = options["mask"].t().contiguous().t()
    check_op(ops.patch_embed, reference.patch_embed, tensors, options=options)


def test_layouts_of_indices_and_images(device):
    tensors = inputs(*WHOLE, device=device)
    tensors["images"] = leaf(LAYOUTS["channels last"](tensors["images"].detach()))
    options = {"visible": visible(3, 6, 4, device).t().contiguous().t()}
    check_op(ops.patch_embed, reference.patch_embed, tensors, options=options)


def test_under_autocast(device):
    tensors, options = masked(*WHOLE, device=device)

    def autocast(function):
        def call(**tensors):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=tensors["weight"].dtype != torch.float64):
                return function(**tensors)

        return call

    assert autocast(ops.patch_embed)(**tensors, **options).dtype == torch.float32
    check_op(autocast(ops.patch_embed), autocast(reference.patch_embed), tensors, options=options)


@pytest.mark.parametrize("kind", ["mask", "visible"])
def test_gradcheck(kind, device):
    B, image, patch, C = SMALL
    tensors, options = masked(B, image, patch, C, channels=2, dtype=torch.float64, device=device)
    options["mask"] = torch.tensor([[True, False, False, True], [False, False, True, False]], device=device)
    if kind == "visible":
        del tensors["mask_token"]
        options = {"visible": torch.tensor([[3, 0], [1, 2]], device=device)}
    names = list(tensors)

    def embed(*given):
        return ops.patch_embed(**dict(zip(names, given, strict=True)), **options)

    assert torch.autograd.gradcheck(embed, list(tensors.values()), eps=1e-6)


@pytest.mark.parametrize("kind", ["mask", "visible"])
def test_reruns_are_equal_bit_for_bit(kind, device):
    tensors, options = masked(*WHOLE, device=device)
    if kind == "visible":
        del tensors["mask_token"]
        options = {"visible": visible(3, 6, 4, device)}
    upstream, results = None, []
    for _ in range(2):
        out = ops.patch_embed(**tensors, **options)
        upstream = torch.randn_like(out) if upstream is None else upstream
        results.append([out, *torch.autograd.grad(out, list(tensors.values()), upstream)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_index_out_of_range_is_not_read_and_shows(device):
    tensors = inputs(1, (4, 8), (4, 4), 36, device=device, grad=False)
    try:
        out = ops.patch_embed(**tensors, visible=torch.tensor([[0, 2, -1]], device=device)[:, :2])
    except (IndexError, RuntimeError):  # without kernels
        return
    assert out[:, :2].isfinite().all() and out[:, 2].isnan().all()


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"mask": (3, 6)}, ValueError, "mask is given alone; expected both, or neither"),
        ({"mask_token": (36,)}, ValueError, "mask_token is given alone"),
        ({"mask": (3, 5), "mask_token": (36,)}, ValueError, r"mask has shape \(3, 5\); expected \(3, 6\)"),
        ({"mask": (3, 6), "mask_token": (35,)}, ValueError, r"mask_token has shape \(35,\); expected \(36,\)"),
        ({"mask": (3, 6), "mask_token": (36,), "visible": (3, 2)}, ValueError, "mask and visible are given"),
        ({"visible": (2, 2)}, ValueError, r"visible has shape \(2, 2\); expected \(3, patches\), 6 at most"),
        ({"visible": (3, 7)}, ValueError, r"visible has shape \(3, 7\)"),
        ({"visible": (3,)}, ValueError, r"visible has shape \(3,\)"),
    ],
    ids=str,
)
def test_bad_shapes_are_refused(more, error, message, device, no_launch):
    make_one = {
        "mask": lambda shape: torch.zeros(shape, dtype=torch.bool, device=device),
        "mask_token": lambda shape: torch.zeros(shape, device=device),
        "visible": lambda shape: torch.zeros(shape, dtype=torch.int64, device=device),
    }
    with pytest.raises(error, match=message):
        ops.patch_embed(**inputs(*WHOLE, device=device), **{n: make_one[n](shape) for n, shape in more.items()})


def test_bad_dtypes_are_refused(device, no_launch):
    tensors, options = masked(*WHOLE, device=device)
    for more, message in (
        ({"mask": options["mask"].float()}, "mask has dtype torch.float32; expected bool"),
        ({"mask": [[True]]}, "mask is a list; expected a torch.Tensor"),
        ({"mask": options["mask"], "mask_token": tensors["mask_token"].double()}, "mask_token has dtype torch.float64"),
    ):
        with pytest.raises(TypeError, match=message):
            ops.patch_embed(**tensors | more)
    del tensors["mask_token"]
    with pytest.raises(TypeError, match=r"visible has dtype torch.float32; expected int64 or int32"):
        ops.patch_embed(**tensors, visible=torch.zeros(3, 2, device=device))
    with pytest.raises(ValueError, match="visible is on meta; expected"):
        ops.patch_embed(**tensors, visible=torch.zeros(3, 2, dtype=torch.int64, device="meta"))


def test_reference_against_published_code():
    """BEiT's ``x * (1 - w) + mask_token * w`` and MAE's ``torch.gather``, in fp64."""
    tensors, options = masked(*WHOLE, R=1, dtype=torch.float64, grad=False)
    x = torch.nn.functional.conv2d(tensors["images"], tensors["weight"], tensors["bias"], 4).flatten(2).transpose(1, 2)
    w = options["mask"].unsqueeze(-1).type_as(x)
    beit = torch.cat([tensors["prefix_tokens"].expand(3, -1, -1), x * (1 - w) + tensors["mask_token"] * w], 1)
    torch.testing.assert_close(reference.patch_embed(**tensors, **options), beit + tensors["pos_embed"])
    keep = visible(3, 6, 4, "cpu")
    mae = torch.gather(x + tensors["pos_embed"][:, 1:], 1, keep.unsqueeze(-1).repeat(1, 1, 36))
    mae = torch.cat([(tensors["prefix_tokens"] + tensors["pos_embed"][:, :1]).expand(3, -1, -1), mae], 1)
    del tensors["mask_token"]
    torch.testing.assert_close(reference.patch_embed(**tensors, visible=keep), mae)
