"""Judge a quantized graph: a graph and its network go in, SQNR, agreement, accuracy and the share of INT8 come out.

Every tool's graph is executed by the same ONNX Runtime on the same images. Where this CPU's integer sums would saturate (no
VNNI), Q/DQ pairs are evaluated in float, so that nobody's 8-bit weights are judged by that.
"""

from __future__ import annotations

from pathlib import Path

import cases
import networks
import numpy as np
import onnx_ir as ir
from rows import features

from rdeploy.graph import cost
from rdeploy.quantize.ranges import activations

_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Flatten")


def outputs(graph: Path, images: networks.Batches) -> np.ndarray:
    """Return logits (N, classes, ...), or the mean patch feature of a ViT whose output is tokens."""
    name = ir.load(graph).graph.outputs[0].name or ""
    return np.asarray(features(np.concatenate([values[name] for values in activations(graph, [name], images)])))


def compare(exact: np.ndarray, found: np.ndarray, network: networks.Network) -> dict[str, float | None]:
    """Return SQNR in dB, the share decided as FP32 does, and the accuracy of both where there are labels."""
    noise = np.square(exact - found, dtype=np.float64).sum()
    truth = network.labels[network.order[-len(exact) :]]
    known = truth != cases.VOID if truth.ndim == 3 else np.ones(len(truth), bool)
    labelled = not network.name.startswith("vit_s14")
    right = [float((rows.argmax(1) == truth)[known].mean()) if labelled else None for rows in (found, exact)]
    return {
        "sqnr_db": float(10 * np.log10(np.square(exact, dtype=np.float64).sum() / max(noise, 1e-300))),
        "agreement": float((exact.argmax(1) == found.argmax(1)).mean()),
        "top1": right[0],
        "top1_fp32": right[1],
    }


def int8_share(graph: Path) -> float:
    """Return the share of all multiply-accumulates, attention included, whose two factors are both dequantized integers."""
    import onnx

    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.load(graph), data_prop=True))
    macs = {layer.name: layer.macs for layer in cost.layers_of(model.graph)}
    done = sum(
        macs.get(node.name or "", 0)
        for node in model.graph
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") and all(_dequantized(v) for v in node.inputs[:2])
    )
    return done / max(sum(macs.values()), 1)


def is_symmetric(graph: Path) -> bool:
    """Whether all zero points are 0 and signed, as TensorRT demands."""
    for node in ir.load(graph).graph:
        if node.op_type == "QuantizeLinear":
            zero = ir.convenience.get_const_tensor(node.inputs[2]) if len(node.inputs) > 2 else None
            if zero is None or zero.dtype != ir.DataType.INT8 or zero.numpy().any():
                return False
    return True


def _dequantized(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _MOVES:
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    return node is not None and node.op_type == "DequantizeLinear"
