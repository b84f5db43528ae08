"""The FID Inception network against an independent implementation (recorded), and the readers of its two weight files.

golden/inception.json holds every 61st value of the three outputs of torch-fidelity 0.4.0's FeatureExtractorInceptionV3 (which
has the graph's resize), with the random weights of random_inception.py, on one photograph at four sizes. No trained weights are
at hand here: the file format and the arithmetic are checked, not the published numbers.
"""

import json

import jax
import numpy as np
import pytest
import random_inception
import safetensors.numpy
import skimage.data
from PIL import Image
from places import GOLDEN
from tensorboardX.proto.graph_pb2 import GraphDef

from dip_jax.errors import UserError
from dip_jax.metrics import features, inception

ANSWERS = json.loads((GOLDEN / "inception.json").read_text())
PARTS = {"conv.weight": "conv2d_params", "bn.weight": "batchnorm/gamma", "bn.bias": "batchnorm/beta"}
PARTS |= {"bn.running_mean": "batchnorm/moving_mean", "bn.running_var": "batchnorm/moving_variance"}


@pytest.fixture(scope="module")
def tensors():
    return random_inception.tensors(ANSWERS["shapes"])


@pytest.fixture(scope="module")
def weights_file(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    safetensors.numpy.save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def params(weights_file):
    return inception.load(weights_file)


def photograph(size):
    image = skimage.data.astronaut()
    if size == 299:
        return image[None, :299, :299]
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX))[None]


@pytest.mark.parametrize(
    "size", [64, 299, pytest.param(256, marks=pytest.mark.slow), pytest.param(512, marks=pytest.mark.slow)]
)
def test_all_three_outputs_equal_an_independent_implementation(params, size):
    out = jax.tree.map(np.asarray, inception.features(params, photograph(size)))
    assert {name: value.shape[1] for name, value in out.items()} == {**inception.DIMENSIONS, "logits": 1008}
    for name, golden in ANSWERS[str(size)].items():
        np.testing.assert_allclose(out[name][0, ::61], golden["values"], rtol=0, atol=1e-5 * golden["largest"], err_msg=name)
        np.testing.assert_allclose(np.linalg.norm(out[name]), golden["norm"], rtol=1e-5, err_msg=name)


def resized_by_definition(row, size):
    """TensorFlow 1: output i reads position i * n / size, in float32, between its two neighbours."""
    out = []
    for i in range(size):
        at = np.float32(i) * np.float32(len(row) / size)
        low = int(at)
        high = min(low + 1, len(row) - 1)
        out.append(row[low] * (1 - (at - low)) + row[high] * (at - low))
    return np.array(out)


@pytest.mark.parametrize("height, width", [(64, 32), (300, 299), (512, 640)])
def test_resize_is_tensorflow_ones(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width)).astype(np.float32)
    rows = np.apply_along_axis(resized_by_definition, 1, image, 299)
    expected = np.apply_along_axis(resized_by_definition, 0, rows, 299)
    got = inception._resize(jax.numpy.asarray(image)[None, :, :, None])
    np.testing.assert_allclose(np.asarray(got)[0, :, :, 0], expected, atol=1e-4)


def test_mean_pool_leaves_the_padding_out():
    got = inception._mean_pool(jax.numpy.full((1, 4, 5, 2), 3.0))
    np.testing.assert_allclose(got, np.full((1, 4, 5, 2), 3.0), rtol=1e-6)


def write_graph(tensors, path):
    """A frozen graph with the scopes of classify_image_graph_def.pb."""
    graph = GraphDef()
    named = {"softmax/weights": tensors["fc.weight"].T, "softmax/biases": tensors["fc.bias"]}
    for name, scope in inception._convolutions().items():
        for part, tail in PARTS.items():
            value = tensors[f"{name}.{part}"]
            named[f"{scope}/{tail}"] = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
    for name, value in named.items():
        node = graph.node.add(name=name, op="Const")
        tensor = node.attr["value"].tensor
        tensor.dtype = 1
        for n in value.shape:
            tensor.tensor_shape.dim.add(size=n)
        tensor.tensor_content = np.ascontiguousarray(value).tobytes()
    size = graph.node.add(name="ResizeBilinear/size", op="Const").attr["value"].tensor
    size.dtype = 3
    size.tensor_content = np.array([299, 299], np.int32).tobytes()
    graph.node.add(name="conv", op="Relu", input=["conv/control_dependency"])
    path.write_bytes(graph.SerializeToString())


@pytest.mark.slow
def test_the_tensorflow_graph_gives_the_same_parameters(tensors, params, tmp_path):
    write_graph(tensors, tmp_path / "classify_image_graph_def.pb")
    jax.tree.map(np.testing.assert_array_equal, inception.load(tmp_path / "classify_image_graph_def.pb"), params)


def test_the_scopes_are_those_of_the_graph():
    scopes = inception._convolutions()
    assert len(scopes) == len(set(scopes.values())) == 94
    assert set(scopes) == set(ANSWERS["shapes"])
    assert scopes["Mixed_6d.branch1x1"] == "mixed_6/conv"  # what sFID reads
    assert scopes["Mixed_7c.branch3x3dbl_3b"] == "mixed_10/tower_1/mixed/conv_1"


def test_the_network_names_its_metrics_without_a_suffix(weights_file):
    network = features.open_network("inception", str(weights_file))
    assert network.suffix == "" and network.dimensions == {"pool": 2048, "spatial": 2023}
    assert "TF1 bilinear" in network.input(256, 256) and "bilinear" not in network.input(299, 299)


@pytest.mark.parametrize("path", ["", "missing.pb"])
def test_absent_weights_say_where_they_are_and_which_hash(path):
    with pytest.raises(UserError, match="6726825d") as error:
        inception.load(path)
    assert "\n" not in str(error.value)


def test_damaged_and_foreign_weights(tensors, tmp_path):
    path = tmp_path / "graph.pb"
    path.write_bytes(b"no graph at all" * 10)
    with pytest.raises(UserError, match="truncated, damaged, or no TensorFlow graph"):
        inception.load(path)
    other = tmp_path / "other.safetensors"
    stem = {name: value for name, value in tensors.items() if name.startswith("Conv2d_") and "4a_3x3.conv" not in name}
    safetensors.numpy.save_file(stem, other)
    with pytest.raises(UserError, match=r"Conv2d_4a_3x3\.conv\.weight is missing: not the FID Inception network"):
        inception.load(other)


@pytest.mark.slow
@pytest.mark.parametrize("name, shape", [("fc.weight", (1000, 2048)), ("Mixed_5c.branch1x1.conv.weight", (64, 192, 1, 1))])
def test_weights_of_another_shape(tensors, tmp_path, name, shape):
    safetensors.numpy.save_file({**tensors, name: np.zeros(shape, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="do not fit"):
        inception.load(tmp_path / "other.safetensors")
