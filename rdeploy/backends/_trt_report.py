"""What a TensorRT says about an engine it built: its log and inspector go in, layers, precisions and notes come out."""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Log = Sequence[tuple[int, str]]
Layer = Mapping[str, Any]

_DATA_TYPES = (
    ("int8", "int8"), ("bf16", "bf16"), ("bfloat", "bf16"), ("fp16", "fp16"), ("half", "fp16"),
    ("fp32", "fp32"), ("float", "fp32"),
)  # fmt: skip
"""A word in what TensorRT calls a data type ("Row major Int8 format", "Half"), and the precision that it means."""
_LAYER = re.compile(r"^Name: (.*?), LayerType: (\w+), Inputs: \[(.*?)\], (?:Constants|Outputs): \[(.*)$", re.MULTILINE)
_TYPE = re.compile(r"Data[tT]ype: (\w+)")
_SPARSE = re.compile(r"\(Sparsity\) (.*)")
_PICKED = re.compile(r"picked sparse implementation for layers:(.*)", re.IGNORECASE)
_ELIGIBLE = re.compile(r"layers eligible for sparse math:(.*)", re.IGNORECASE)


def layers_in_log(log: Log) -> tuple[Layer, ...]:
    """Return the kernels that TensorRT-RTX lists in its log after a build; no device is needed to read them."""
    text = next((message for _, message in log if message.startswith("Layers:")), "")
    found = []
    for name, kind, inputs, rest in _LAYER.findall(text):
        types = _TYPE.findall(inputs) or _TYPE.findall(rest)
        found.append({"Name": name, "LayerType": kind, "Datatype": types[0] if types else "", "Details": rest.strip()})
    return tuple(found)


def layers_in_engine(trt: Any, engine: Any) -> tuple[Layer, ...]:
    """Return every layer as the engine inspector tells it; names only where the engine holds no more."""
    told = json.loads(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
    layers = told.get("Layers", ()) if isinstance(told, dict) else ()
    return tuple(layer if isinstance(layer, dict) else {"Name": str(layer)} for layer in layers)


def kernels(layers: Iterable[Layer]) -> tuple[tuple[str, str], ...]:
    """Return (kind, data type of the first input) of every layer that says what it computes in."""
    return tuple((str(layer["LayerType"]), _data_type(layer)) for layer in layers if "LayerType" in layer)


def _data_type(layer: Layer) -> str:
    if "Datatype" in layer:
        return str(layer["Datatype"])
    tensor: Mapping[str, Any] = next(iter([*layer.get("Inputs", ()), *layer.get("Outputs", ())]), {})
    # TensorRT 11 split "Format/Datatype" in two.
    return next((str(value) for key, value in tensor.items() if "datatype" in key.lower()), "")


def count_precisions(found: Iterable[tuple[str, str]]) -> tuple[tuple[str, int], ...]:
    """Count kernels by what they compute in; element-wise code made for the network and reformats count apart."""
    counts = collections.Counter(_precision(kind, data_type) for kind, data_type in found)
    return tuple(sorted(counts.items()))


def _precision(kind: str, data_type: str) -> str:
    if kind == "kgen":
        return "generated"
    if kind.lower() == "reformat":
        return "reorder"
    text = data_type.lower()
    return next((name for word, name in _DATA_TYPES if word in text), "other")


def planned_memory(log: Log) -> tuple[str, ...]:
    """Return the builder's own account of weights and activations, as sentences."""
    pattern = re.compile(r"Total (Weights|Activation) Memory: (\d+) bytes")
    found = [pattern.search(message) for _, message in log]
    return tuple(f"the builder plans {int(m[2])} bytes of {m[1].lower()} memory" for m in found if m)


def sparsity(log: Log) -> str:
    """Return in one sentence whether kernels for 2:4 sparse weights were chosen.

    The builder names the layers whose weights are sparse, and of those the ones where the sparse kernel was faster; a
    builder that says neither (TensorRT-RTX chooses on the device) is quoted as silent, not as "none".
    """
    told = [match[1] for _, message in log if (match := _SPARSE.search(message))]
    eligible = _named(told, _ELIGIBLE)
    picked = _named(told, _PICKED)
    if eligible is None and picked is None:
        return "sparse_weights was set; the builder did not say whether any layer's weights are 2:4 sparse"
    names = f": {', '.join(picked)}" if picked else ""
    return f"sparse_weights: {len(eligible or ())} layers have 2:4 sparse weights, {len(picked or ())} run sparse kernels{names}"


def _named(told: Iterable[str], pattern: re.Pattern[str]) -> tuple[str, ...] | None:
    found = [match[1] for text in told if (match := pattern.search(text))]
    if not found:
        return None
    return tuple(name.strip() for text in found for name in text.split(",") if name.strip())
