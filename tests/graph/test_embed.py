"""Preprocessing in the graph against `data.preprocess`: at most one step of 255 apart, whatever the runtime."""

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image

from rdeploy import backends, export, hardware
from rdeploy.data import preprocess
from rdeploy.errors import Unsupported
from rdeploy.graph import embed
from rdeploy.types import INTERPOLATIONS, Preprocessing, Target

from ..onnx_text import write

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def prep(interpolation="bicubic"):
    return Preprocessing(mean=MEAN, std=STD, interpolation=interpolation, crop_pct=1.0)


def pictures(size, count=2, seed=0):
    """Noise has every frequency, and clips: harder than photographs."""
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(("size", "to"), [(224, 168), (61, 40), (40, 61), (224, 96), (50, 50)])
def test_the_matrix_of_an_axis_is_pillows_resize(interpolation, size, to):
    row = np.random.default_rng(1).integers(0, 256, (1, size), dtype=np.uint8)
    exact = np.asarray(Image.fromarray(row).resize((to, 1), Image.Resampling[interpolation.upper()]))[0]

    found = embed.resize_matrix(size, to, interpolation) @ row[0].astype(np.float64)

    assert np.abs(np.clip(np.floor(found + 0.5), 0, 255) - exact).max() == 0


@pytest.mark.parametrize(("size", "to"), [(224, 168), (61, 40), (40, 61), (224, 96)])
def test_without_antialiasing_the_matrix_is_preprocess_own(size, to):
    row = np.random.default_rng(1).integers(0, 256, (1, size, 3), dtype=np.uint8)
    sharp = Preprocessing(mean=MEAN, std=STD, interpolation="bilinear", antialias=False)

    found = embed.resize_matrix(size, to, "bilinear", antialias=False) @ row[0, :, 0].astype(np.float64)

    exact = preprocess.cut(row, (0.0, 0.0, 1.0, float(size)), (1, to), sharp, channels=3)[0, :, 0]
    assert np.abs(np.floor(found + 0.5) - exact).max() == 0


def identity(path, resolution):
    """A graph that returns the network's input, so that it can be looked at."""
    return write(path, "y = Identity(x)", x=("n", 3, *resolution))


def embedded(path, resolution, native, preprocessing):
    identity(path, resolution)
    model = ir.load(path)
    embed.embed(model, native, preprocessing)
    ir.save(model, path)
    export.check_graph(export.describe(path, precision="fp32"))
    return path


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "reference"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
def test_what_the_network_sees_is_what_python_would_give_it(tmp_path, backend, interpolation):
    plugin = backends.find(backend)
    if reason := plugin.unavailable():
        pytest.skip(reason)
    native, resolution, told = (48, 64), (36, 40), prep(interpolation)
    path = embedded(tmp_path / "model.onnx", resolution, native, told)
    engine = plugin.build_engine(path, tmp_path / "engine", target=Target(name="cpu"), options=plugin.Options())
    images = pictures(native)
    squeezed = Preprocessing(mean=MEAN, std=STD, interpolation=interpolation, crop_pct=1.0, crop_mode="squash")
    pixels = np.stack([preprocess.to_pixels(image, resolution, squeezed) for image in images])

    with plugin.open_session(tmp_path / "engine" / engine.path) as session:
        assert (session.inputs[0].dtype, session.inputs[0].shape[1:]) == ("uint8", (48, 64, 3))
        found = session.run({session.inputs[0].name: images})[session.outputs[0].name]

    steps = np.abs(found - preprocess.normalise(pixels, told)) * 255 * np.array(STD).reshape(3, 1, 1)
    if (
        backend == "openvino" and "avx512_bf16" in hardware.cpu_flags()
    ):  # the products run in BF16: a pixel over 128 has 7 bits
        assert steps.max() <= 3.01
        assert steps.mean() < 0.5
    else:
        assert steps.max() <= 1.01  # a tie may be rounded the other way
        assert (steps > 0.01).mean() < 0.005


def test_at_the_native_size_only_the_normalisation_is_left(tmp_path):
    path = embedded(tmp_path / "model.onnx", (8, 8), (8, 8), prep())

    assert [node.op_type for node in ir.load(path).graph] == ["Cast", "Transpose", "Mul", "Add", "Identity"]


@pytest.mark.needs("tensorrt_rtx")
def test_tensorrt_builds_it(tmp_path):
    plugin = backends.find("tensorrt_rtx")
    if reason := plugin.unavailable():
        pytest.skip(reason)
    path = embedded(tmp_path / "model.onnx", (36, 40), (48, 64), prep())
    target = Target(name="gpu", compute_capabilities=("sm_89",))

    engine = plugin.build_engine(path, tmp_path / "engine", target=target, options=plugin.Options())

    assert engine.size_bytes > 0


def test_an_input_that_is_no_picture_is_refused(tmp_path):
    path = identity(tmp_path / "model.onnx", ("h", 8))

    with pytest.raises(Unsupported, match=r"the preprocessing cannot be put in front of the input 'x' of shape"):
        embed.embed(ir.load(path), (8, 8), prep())
