"""What can be expected of a precision before minutes are spent: a target and the machine's features go in, sentences come out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence, Set
from typing import TYPE_CHECKING

from rdeploy import backends, capabilities, hardware, preflight
from rdeploy.types import Target

if TYPE_CHECKING:
    from rdeploy.graph.work import Work

_QDQ_IN_FP16 = 19
"""The opset from which scales may be FP16."""
_CUDA = "onnxruntime_cuda"
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
        instead = "OpenVINO executes the FP32 variant in bf16 on this CPU where that is faster, and says so"
    return f"FP16 does not pay on target {target.name}: {names} compute FP16 graphs in FP32, with casts around it; {instead}"


def expect(
    work: Work, target: Target, precisions: Sequence[str], *, flags: Set[str] | None = None, x86: bool | None = None
) -> tuple[str, ...]:
    """Return what can be expected of INT8 and FP16 on a target, from the graph and the hardware alone.

    Args:
        flags, x86: this machine's CPU; those of the machine itself when not given.
    """
    present = hardware.cpu_flags() if flags is None else flags
    found: list[str] = []
    if "int8" in precisions:
        found += _int8_hardware(target, present, hardware.is_x86() if x86 is None else x86)
        found += _int8_graph(work, target)
    if "fp16" in precisions and (reason := no_fp16(target, flags=present)):
        found.append(reason)
    return tuple(dict.fromkeys(found))


def _int8_hardware(target: Target, flags: Set[str], x86: bool) -> Iterator[str]:
    if "tensorrt_rtx" in target.backends:
        yield "TensorRT-RTX documents INT8 for the weights of matrix products only: a smaller engine, no promise of speed"
    if _CUDA in target.backends:
        yield "ONNX Runtime's CUDA provider has no INT8 kernels: it executes Q/DQ pairs in float, exact and slower"
    modules = [name for name in target.backends if getattr(backends.find(name), "NEEDS_MODULE", False)]
    if modules:
        yield f"INT8 is not executed by {', '.join(modules)}: what runs there is the PyTorch module, in float"
    if set(target.backends) & set(capabilities.RUNTIMES):
        for name in target.compute_capabilities or tuple(gpu.compute_capability for gpu in hardware.gpus()):
            if not has_int8_tensor_cores(name):
                yield f"{name} has no INT8 tensor cores (they came with sm_72 and sm_75): FP16 is likely to be as fast"
    elif set(target.backends) - {_CUDA, *modules}:
        yield _int8_on_cpu(flags, x86=x86)


def _int8_on_cpu(flags: Set[str], *, x86: bool) -> str:
    if not x86:
        instructions = "i8mm" if "i8mm" in flags else "dot products" if "asimddp" in flags else None
        return (
            f"this CPU has INT8 {instructions}"
            if instructions
            else "this CPU has no INT8 dot products: INT8 may not pay"
        )
    if "amx_int8" in flags:
        return (
            "this CPU has AMX: INT8 matrix products run at twice the rate of bf16, which FP32 graphs may be executed in"
        )
    if flags & {"avx512_vnni", "avx_vnni"}:
        return "this CPU has VNNI: expect INT8 at 1.3 to 1.7 times the speed of FP32 (measured on such CPUs)"
    return "this CPU has neither VNNI nor AMX: INT8 weights get 7 bits, and the gain over FP32 is small"


def has_int8_tensor_cores(compute_capability: str) -> bool:
    """Whether a GPU ("sm_75") multiplies INT8 matrices: Turing and later, and the Volta of Jetson Xavier."""
    number = re.fullmatch(r"sm_(\d+)", compute_capability)
    return number is not None and (int(number[1]) >= 75 or int(number[1]) == 72)


def _int8_graph(work: Work, target: Target) -> Iterator[str]:
    if work.depthwise > _MUCH:
        yield (
            f"{work.depthwise:.0%} of the MACs are depthwise convolutions: they wait for memory, so INT8 gains less there, and "
            "they lose the most accuracy (--max-drop leaves the worst of them in float)"
        )
    if work.narrow > _MUCH:
        yield f"{work.narrow:.0%} of the MACs are in layers of fewer than 16 channels, which fill no tile of an INT8 unit"
    if work.attention > _MUCH:
        some = ", but for queries x keys on OpenVINO where they cost little" if "openvino" in target.backends else ""
        yield f"{work.attention:.0%} of the MACs multiply two activations (attention) and stay in float{some}"
    if work.tokens > LONGEST_INT8_ATTENTION and "tensorrt" in target.backends:
        yield (
            f"attention runs over {work.tokens} tokens: TensorRT fuses INT8 attention up to {LONGEST_INT8_ATTENTION}, "
            "which a lower resolution brings it under"
        )


_MUCH = 0.1
LONGEST_INT8_ATTENTION = 512
