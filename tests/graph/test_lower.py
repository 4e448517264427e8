import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the graphs are written with onnx: pip install 'rdeploy[torch]'")

import onnx_ir as ir  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from rdeploy import capabilities  # noqa: E402
from rdeploy.graph import lower, needs  # noqa: E402
from rdeploy.types import Target  # noqa: E402

SCALE, BIAS = np.array([1.0, -2.0, 0.5, 3.0], np.float32), np.array([0.5, 0.0, -1.0, 2.0], np.float32)


def normalising(path, *, opset=17, bias=True, shape=("n", 3, 4), kind=TensorProto.FLOAT, **attributes):
    """x -> LayerNormalization -> y, a graph output of that name."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    constants = [("scale", SCALE), *([("bias", BIAS)] if bias else [])]
    node = helper.make_node(
        "LayerNormalization", ["x", *(name for name, _ in constants)], ["y"], name="norm", **attributes
    )
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", kind, shape)], [helper.make_tensor_value_info("y", kind, shape)],
        [numpy_helper.from_array(value.astype(dtype), name) for name, value in constants],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)
    return path


def lowered(path):
    model = ir.load(path)
    count = lower.lower(model, ["LayerNormalization"])
    ir.save(model, path.with_name("lowered.onnx"))
    return path.with_name("lowered.onnx"), count


def values(count=2):
    return np.random.default_rng(0).normal(3.0, 2.0, (count, 3, 4)).astype(np.float32)


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_normalization_becomes_what_it_means(tmp_path, opset, bias):
    path, count = lowered(normalising(tmp_path / "m.onnx", opset=opset, bias=bias, epsilon=1e-3))

    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    x = values().astype(np.float64)
    centred = x - x.mean(-1, keepdims=True)
    wanted = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3) * SCALE + (BIAS if bias else 0.0)
    (made,) = ReferenceEvaluator(model).run(None, {"x": values()})
    np.testing.assert_allclose(made, wanted, rtol=1e-5, atol=1e-5)
    assert count == 1
    assert "LayerNormalization" not in {node.op_type for node in model.graph.node}
    assert [output.name for output in model.graph.output] == ["y"]


def test_the_axes_from_the_given_one_on_are_averaged_over(tmp_path):
    path, _ = lowered(normalising(tmp_path / "m.onnx", axis=1, bias=False))

    x = values().astype(np.float64)
    centred = x - x.mean((1, 2), keepdims=True)
    wanted = centred / np.sqrt((centred**2).mean((1, 2), keepdims=True) + 1e-5) * SCALE
    (made,) = ReferenceEvaluator(onnx.load(path)).run(None, {"x": values()})
    np.testing.assert_allclose(made, wanted, rtol=1e-5, atol=1e-5)


def test_the_type_stays(tmp_path):
    path, _ = lowered(normalising(tmp_path / "m.onnx", kind=TensorProto.FLOAT16))

    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert needs.read(path).precisions == ("fp16",)


def test_what_was_not_asked_for_is_left_alone(tmp_path):
    model = ir.load(normalising(tmp_path / "m.onnx"))

    assert lower.lower(model, ["Gelu"]) == 0
    assert [node.op_type for node in model.graph] == ["LayerNormalization"]
    assert lower.lowerable(["Gelu", "LayerNormalization"]) == ("LayerNormalization",)


def test_tensorrt_8_5_takes_the_graph_afterwards(tmp_path):
    entry = capabilities.find("tensorrt", "8.5")
    path = normalising(tmp_path / "m.onnx")
    assert "has no LayerNormalization (norm)" in capabilities.obstacles(needs.read(path), entry, Target(name="t"))[0]

    path, _ = lowered(path)

    assert capabilities.obstacles(needs.read(path), entry, Target(name="t")) == ()
