"""Write small ONNX graphs from ONNX's own text form, the weights given as arrays; every node is named after its output."""

import numpy as np
import onnx
from onnx import helper, numpy_helper, parser, shape_inference


def model(body, *, x=(1, 3, 8, 8), outputs=("y",), opset=18, domains=(), check=True, **constants):
    """Return the graph whose nodes are the lines of `body`; its input is the float tensor `x`.

    Shapes are inferred and the graph is checked, unless it holds operators that ONNX's checker cannot judge.
    """
    sizes = ",".join(str(size) for size in x)
    graph = parser.parse_graph(f"g (float[{sizes}] x) => () {{ {body} }}")
    graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs)
    for node in graph.node:
        node.name = node.name or node.output[0]
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items())
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=8)
    if check:
        proto = shape_inference.infer_shapes(proto, strict_mode=True)
        onnx.checker.check_model(proto, full_check=True)
    return proto


def write(path, body, **facts):
    """Write what `model` returns to `path` and return the path."""
    onnx.save(model(body, **facts), str(path))
    return path


def run(path, image, *names):
    """Run a graph with ONNX Runtime, Q/DQ pairs as they stand, and return its first output, or the outputs named."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = session.run(list(names) or None, {session.get_inputs()[0].name: image})
    return found[0] if len(names) <= 1 else found


def normal(*shape, seed=0, scale=1.0):
    """Return Gaussian float32 values of a shape."""
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)
