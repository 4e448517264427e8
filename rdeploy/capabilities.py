"""What a graph needs against what a TensorRT and its device have: all obstacles at once, before anything is built.

The table is `capabilities.yaml`, with its sources. Nothing here reads a graph (`graph/needs.py` does) or loads TensorRT.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdeploy import strict_yaml
from rdeploy.errors import ConfigError
from rdeploy.types import Target

Places = tuple[str, ...]
"""Names of the nodes in question, in the order of the graph."""

RUNTIMES = ("tensorrt", "tensorrt_rtx")
_TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_TURING = "sm_75"
_FIRST_BF16 = 80
"""The compute capability that brought BF16; TensorRT has it where networks are strongly typed (9.0 and later)."""
_FORMS = {
    "pool_dilation": "pooling with a dilation",
    "pool_indices": "MaxPool with its indices as a second output",
    "resize_antialias": "Resize with antialiasing",
    "resize_coordinates": "Resize with half_pixel_symmetric coordinates or an aspect ratio policy",
    "einsum_ellipsis": "Einsum with an ellipsis or a repeated index",
    "scatter_reduction": "Scatter with a reduction",
}
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What an ONNX graph asks of a runtime; `graph.needs` reads it from a file.

    `forms` are special forms of operators by name (`_FORMS`), `foreign` the operators that are not ONNX's own. `precisions`
    are those of its float tensors, with "int8" where it carries Q/DQ pairs.
    """

    opset: int
    operators: tuple[tuple[str, Places], ...]
    forms: tuple[tuple[str, Places], ...] = ()
    foreign: tuple[tuple[str, Places], ...] = ()
    precisions: tuple[str, ...] = ("fp32",)
    unsigned: Places = ()
    zero_points: Places = ()
    integer_biases: Places = ()
    dynamic: Places = ()
    weight_bytes: int = 0
    activation_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """One release line of a runtime: an entry of the table."""

    runtime: str
    version: str
    opset: int
    lacks: tuple[str, ...]
    refuses: tuple[str, ...]
    typing: str
    dla: str
    compute_capabilities: tuple[str, ...]
    sources: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{_TITLES[self.runtime]} {self.version}"


@functools.cache
def table() -> tuple[Capability, ...]:
    """Return all entries, oldest first, TensorRT before TensorRT-RTX."""
    content = _content()
    found = []
    for name, entry in content.items():
        runtime, _, version = name.rpartition("-")
        if runtime:
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
            for key in ("lacks", "refuses"):  # what none of them takes, and what this one does not
                values[key] = tuple(sorted({*content["all"][key], *values[key]}))
            found.append(Capability(runtime=runtime, version=version, **values))
    return tuple(sorted(found, key=lambda entry: (entry.runtime, _numbers(entry.version))))


@functools.cache
def dla_operators() -> frozenset[str]:
    """Return the ONNX operators that Orin's DLA executes itself; the others fall back to the GPU."""
    return frozenset(_content()["dla"]["operators"])


def _content() -> dict[str, Any]:
    return dict(strict_yaml.read(Path(__file__).with_name("capabilities.yaml"), what="table of capabilities"))


def find(runtime: str, version: str) -> Capability:
    """Return the entry of a version: the newest that is not newer than it, or the oldest of all.

    Raises:
        ConfigError: the runtime is not in the table.
    """
    entries = [entry for entry in table() if entry.runtime == runtime]
    if not entries:
        raise ConfigError(f"there are no capabilities of {runtime}; there are: {', '.join(RUNTIMES)}")
    wanted = _numbers(version)
    older = [entry for entry in entries if _numbers(entry.version) <= wanted]
    return (older or entries[:1])[-1]


def obstacles(needs: Needs, capability: Capability, target: Target) -> tuple[str, ...]:
    """Return every reason why this graph cannot be built there, one sentence each with the way out; empty when it can."""
    return (
        *_operators(needs, capability),
        *_quantization(needs, capability),
        *_device(needs, capability, target),
        *_dla(needs, capability, target),
    )


def _operators(needs: Needs, capability: Capability) -> Iterator[str]:
    title = capability.title
    if needs.opset > capability.opset:
        yield f"the graph is opset {needs.opset}, {title} reads up to {capability.opset}: set opset in the profile"
    for operator, places in needs.operators:
        if operator in capability.lacks:
            yield f"{title} has no {operator} ({_where(places)}): {_way_out(operator, capability)}"
    for operator, places in needs.foreign:
        yield f"{title} has no {operator} ({_where(places)}), which is not an operator of ONNX: export without custom operators"
    for form, places in needs.forms:
        if form in capability.refuses:
            yield f"{title} refuses {_FORMS[form]} ({_where(places)}): write it with other operators"
    if needs.dynamic:
        yield f"only the first dimension may be dynamic, not those of {_where(needs.dynamic)}: export at one resolution"


def _way_out(operator: str, capability: Capability) -> str:
    newer = [c for c in table() if c.runtime == capability.runtime and operator not in c.lacks]
    return f"{newer[0].title} has it" if newer else "write it with other operators"


def _quantization(needs: Needs, capability: Capability) -> Iterator[str]:
    hint = "quantize for this backend, not for a CPU runtime"
    if needs.zero_points:
        yield f"{capability.title} takes symmetric INT8 only, zero points are not 0 at {_where(needs.zero_points)}: {hint}"
    elif needs.unsigned:
        yield f"{capability.title} takes signed INT8 only, {_where(needs.unsigned)} quantizes to UINT8: {hint}"
    if needs.integer_biases:
        yield f"{capability.title} takes no INT32 DequantizeLinear ({_where(needs.integer_biases)}): leave biases in float"


def _device(needs: Needs, capability: Capability, target: Target) -> Iterator[str]:
    wanted = target.compute_capabilities
    unknown = [name for name in wanted if name not in capability.compute_capabilities]
    # TensorRT builds for the GPU that is here, one of those wanted; RTX for all of them at once.
    if unknown and (capability.runtime == "tensorrt_rtx" or len(unknown) == len(wanted)):
        known = ", ".join(capability.compute_capabilities)
        yield f"{capability.title} does not build for {', '.join(unknown)}, only for {known}"
    products = [places for operator, places in needs.operators if operator in ("Gemm", "MatMul")]
    if capability.runtime == "tensorrt_rtx" and _TURING in wanted and products and "fp32" in needs.precisions:
        where = _where(products[0])
        yield f"{capability.title} has no FP32 matrix product on Turing ({where}): build FP16, or leave {_TURING} out"
    if "bf16" in needs.precisions:
        older = [name for name in wanted if int(name.removeprefix("sm_")) < _FIRST_BF16]
        if capability.typing == "weak":
            yield f"{capability.title} takes no BF16: export the model in FP32 or FP16"
        elif older:
            yield f"{', '.join(older)} does not compute in BF16: export the model in FP32 or FP16"
    if target.memory_mb is not None:
        batch = max(target.batch_sizes)
        least = needs.weight_bytes + batch * needs.activation_bytes
        if least > target.memory_mb << 20:
            yield (
                f"weights and live activations at batch {batch} take {least >> 20} MB, "
                f"{target.name} has {target.memory_mb}: a smaller batch or resolution"
            )


def _dla(needs: Needs, capability: Capability, target: Target) -> Iterator[str]:
    options = dict(target.options_of("tensorrt"))
    core = options.get("dla_core")
    if capability.runtime != "tensorrt" or core is None:
        return
    title = capability.title
    if core >= target.dla_cores:
        yield f"{target.name} has {target.dla_cores} DLA cores, so there is no core {core}: leave dla_core out"
    if capability.dla == "none":
        yield f"{title} has no DLA (10.7 was the last before 11.4.1): leave dla_core out"
    elif "int8" in needs.precisions and capability.dla == "fp16":
        yield f"DLA takes no explicit Q/DQ with {title}: build FP16 for DLA, or INT8 for the GPU"
    elif capability.dla == "typed" and not {"fp16", "int8"} & set(needs.precisions):
        yield f"DLA computes in FP16 or INT8, and with {title} the graph decides: build FP16"
    if len(set(target.batch_sizes)) > 1:
        yield "DLA takes no dynamic batch: give the profile one batch size"
    if not options.get("gpu_fallback", True):
        for operator, places in needs.operators:
            if operator not in dla_operators() and operator not in ("QuantizeLinear", "DequantizeLinear"):
                yield f"DLA has no {operator} ({_where(places)}): allow gpu_fallback"


def _where(places: Places) -> str:
    more = len(places) - _SHOWN
    return ", ".join(places[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
