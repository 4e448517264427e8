"""Times by layer of an engine of either TensorRT, from its own profiler, with the copies and what is left as rows beside."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from rdeploy.backends import _layers, _trt_session
from rdeploy.measured import LayerTime, LayerTimes

_WARM_RUNS = 5
_OWN = re.compile(r"^(Reformatting CopyNode|\[|\(Unnamed|shuffle_between|copied_squeeze|reshape_\w+_tmp)")
"""Layers that TensorRT adds: changes of layout, and shapes."""
_WRAPPED = re.compile(r"^(?:PWN|CopyNode|ForeignNode)?[({\[]+(?:ForeignNode\[)?(.*?)[)}\]]+$")


def layer_times(session: _trt_session.Session, inputs: Mapping[str, NDArray[Any]], *, runs: int) -> LayerTimes:
    """Run an unopened session (one that uses no graphs) with TensorRT's profiler on.

    The profiler makes a run wait after every layer, so that the whole is longer than a run without it.
    """
    with session:
        for _ in range(_WARM_RUNS):
            session.run(inputs)
        copies = [session.transfers_ms(inputs) for _ in range(runs)]
        spent = session.profile_layers()
        start = time.perf_counter()
        for _ in range(runs):
            session.run(inputs)
        whole_ms = (time.perf_counter() - start) * 1000.0 / runs
    kernels = [
        LayerTime(name=name, kind=_kind(name), mean_ms=milliseconds / runs, layers=covered(name))
        for name, milliseconds in spent.items()
    ]
    for way in ("upload", "download"):
        mean_ms = sum(copy[way] for copy in copies) / runs
        kernels.append(LayerTime(name=f"({way})", kind="copy", mean_ms=mean_ms))
    return _layers.summed(f"{session.title}'s profiler", kernels, whole_ms=whole_ms, runs=runs)


def covered(name: str) -> tuple[str, ...]:
    """Return the ONNX layers in the name of a TensorRT layer: `a + PWN(b)` and `{ForeignNode[a...b]}` name a and b."""
    if _OWN.match(name):
        return ()
    found = []
    for part in re.split(r" \+ | \|\| |\.\.\.", name):
        inner = part.strip()
        while (match := _WRAPPED.match(inner)) is not None:
            inner = match.group(1).strip()
        found.append(inner.removeprefix("PWN(").removeprefix("{ForeignNode[").rstrip("])}"))
    return tuple(dict.fromkeys(one for one in found if one))


def _kind(name: str) -> str:
    if _OWN.match(name):
        return "reformat"
    if "ForeignNode" in name:
        return "fused"
    return "pointwise" if name.startswith("PWN(") else ""
