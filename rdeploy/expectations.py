"""What can be expected of a precision before minutes are spent: a target and the machine's features go in, sentences come out."""

from __future__ import annotations

from collections.abc import Set

from rdeploy import backends, capabilities, hardware, preflight
from rdeploy.types import Target

_QDQ_IN_FP16 = 19
"""The opset from which scales may be FP16."""
_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}


def computes_fp16(target: Target, backend: str) -> bool:
    """Whether a backend gets FP16 graphs on a target: the profile lists fp16, and the runtime's kernels compute in it."""
    return "fp16" in target.precisions and "fp16" in backends.find(backend).FLOATS


def mixes_int8_with_fp16(target: Target, backend: str) -> bool:
    """Whether the float rest of an INT8 graph is FP16: the profile wants it, and the runtime parses the opset it needs."""
    if target.int8_rest != "fp16" or not computes_fp16(target, backend):
        return False
    if backend not in capabilities.RUNTIMES:
        return True
    return capabilities.find(backend, preflight.version(backend, target)).opset >= _QDQ_IN_FP16


def no_fp16(target: Target, *, flags: Set[str] | None = None) -> str | None:
    """Return why there is no FP16 variant for a target and what would be executed instead, or None where there is one."""
    if any(computes_fp16(target, name) for name in target.backends):
        return None
    names = ", ".join(target.backends)
    if any("fp16" in backends.find(name).FLOATS for name in target.backends):
        return f"the profile of target {target.name} does not list fp16 under precisions"
    present = hardware.cpu_flags() if flags is None else flags
    instead = "FP32 is what would be executed"
    if not _BF16 & present:
        instead += ", since this CPU has no bf16"
    elif "openvino" in target.backends:
        instead = "OpenVINO executes the FP32 variant in bf16 on this CPU by itself, and says so"
    return f"FP16 does not pay on target {target.name}: {names} compute FP16 graphs in FP32, with casts around it; {instead}"
