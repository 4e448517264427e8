"""Write the network that `rdeploy doctor` builds and runs: `python tests/make_probe.py rdeploy/probe.onnx`.

For an image of ones every value can be told by hand: the mean of a 3x3 patch is 1, plus the bias 0, 1, 2, -3 gives
1, 2, 3, -2; Relu; an identity convolution; a residual Add doubles to 2, 4, 6, 0; the mean keeps it; the Gemm reads the
third channel and makes log 1, log 2, log 1 of it; Softmax 1/4, 1/2, 1/4; times 10.
"""

import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def make_probe() -> onnx.ModelProto:
    """Return the probe: ten nodes, opset 17, input `x` (1, 3, 8, 8), output `y` (1, 3)."""
    classifier = np.zeros((3, 4), np.float32)
    classifier[1, 2] = np.log(2.0) / 6.0
    constants = {
        "mean": np.full((4, 3, 3, 3), 1 / 27, np.float32),
        "bias": np.array([0, 1, 2, -3], np.float32),
        "identity": np.eye(4, dtype=np.float32).reshape(4, 4, 1, 1),
        "classifier": classifier,
        "offset": np.zeros(3, np.float32),
        "ten": np.array(10.0, np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "mean", "bias"], ["conv"], name="conv"),
        helper.make_node("Relu", ["conv"], ["relu"], name="relu"),
        helper.make_node("Conv", ["relu", "identity"], ["branch"], name="branch"),
        helper.make_node("Add", ["branch", "relu"], ["sum"], name="sum"),
        helper.make_node("Relu", ["sum"], ["activated"], name="activated"),
        helper.make_node("GlobalAveragePool", ["activated"], ["pooled"], name="pooled"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="flat"),
        helper.make_node("Gemm", ["flat", "classifier", "offset"], ["logits"], name="logits", transB=1),
        helper.make_node("Softmax", ["logits"], ["softmax"], name="softmax", axis=1),
        helper.make_node("Mul", ["softmax", "ten"], ["y"], name="scaled"),
    ]
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model.producer_name = "rdeploy"
    onnx.checker.check_model(model)
    return model


if __name__ == "__main__":
    onnx.save(make_probe(), sys.argv[1])
