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
_ELIGIBLE = re.compile(
    r"\(Sparsity\) (?:Layers eligible for sparse math|Found (\d+) layer\(s\) eligible to use sparse tactics)[:.]?(.*)"
)
_CHOSEN = re.compile(
    r"\(Sparsity\) (?:TRT inference plan picked sparse implementation for layers"
    r"|Chose (\d+) layer\(s\) using sparse tactics)[:.]?(.*)"
)
"""What 8.x and what later versions say of 2:4 sparse weights: how many layers (8.x names them only), and which."""
_SPARSE_TACTIC = re.compile(r"spars|spmma|sp_?gemm", re.IGNORECASE)


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


def sparsity(log: Log, layers: Iterable[Layer] = ()) -> str:
    """Return in one sentence whether kernels for 2:4 sparse weights were chosen.

    The builder tells the layers whose weights are sparse, and those of them where the sparse kernel was faster, once a pass:
    the last pass made the engine. A builder that says neither (TensorRT-RTX chooses on the device) is quoted as silent, not
    as "none". Of `layers`, those whose kernel is named as a sparse one are counted beside it.
    """
    eligible, chosen = (_last_told(log, pattern) for pattern in (_ELIGIBLE, _CHOSEN))
    tactics = [str(layer["TacticName"]) for layer in layers if "TacticName" in layer]
    named = sum(_SPARSE_TACTIC.search(tactic) is not None for tactic in tactics)
    seen = f"; {named} of {len(tactics)} kernels in the engine are sparse ones by their names" if tactics else ""
    if eligible is None and chosen is None:
        return f"sparse_weights was set; the builder did not say whether any layer's weights are 2:4 sparse{seen}"
    (have, _), (run, names) = eligible or (0, ""), chosen or (0, "")
    which = f": {names}" if names else ""
    return f"sparse_weights: {have} layers have 2:4 sparse weights, {run} run sparse kernels{which}{seen}"


def _last_told(log: Log, pattern: re.Pattern[str]) -> tuple[int, str] | None:
    """Return how many layers the last such line tells of, and their names."""
    found = [match for _, message in log if (match := pattern.search(message))]
    if not found:
        return None
    names = [name.strip() for name in found[-1][2].split(",") if name.strip()]
    return int(found[-1][1] or len(names)), ", ".join(names)
