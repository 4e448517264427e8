"""What works on this machine: every backend builds and runs a tiny network, or says why not and what would fix it."""

from __future__ import annotations

import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rdeploy import backends, environment, hardware
from rdeploy.errors import MissingDependency, RdeployError
from rdeploy.types import Target

PROBE = Path(__file__).parent / "probe.onnx"
"""Conv, Relu, Conv, Add, Relu, GlobalAveragePool, Flatten, Gemm, Softmax, Mul; `tests/make_probe.py` wrote it."""
_EXPECTED = np.array([[10.0, 20.0, 10.0]], np.float32) / np.float32(4.0)
"""What the probe gives for an image of ones: its softmax sees log 1, log 2, log 1, and the result is times 10."""
_AHEAD_OF_TIME = "sm_89"


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """One line: `kind` is "backend" or "machine", `status` is "pass", "fail" (then `fix` helps) or "info"."""

    name: str
    kind: str
    status: str
    detail: str
    fix: str = ""


def diagnose() -> tuple[Diagnosis, ...]:
    """Return the facts of the machine that matter, and a verdict on every backend; takes a few seconds."""
    return (*_machine(), *(examine(name) for name in backends.names()))


def examine(name: str) -> Diagnosis:
    """Build and run the probe on one backend."""
    backend = backends.find(name)
    if (reason := backend.unavailable()) is not None:
        return _lacking(name, reason)
    try:
        with tempfile.TemporaryDirectory(prefix="rdeploy-doctor-") as folder:
            return _verdict(name, "pass", _try(backend, Path(folder)))
    except MissingDependency as error:
        return _lacking(name, str(error))
    except RdeployError as error:
        install = f"reinstall it: {backend.INSTALL}" if hasattr(backend, "INSTALL") else ""
        return _verdict(name, "fail", str(error), install)


def _try(backend: Any, folder: Path) -> str:
    """Return what was done, in words.

    Raises:
        RdeployError: the backend does not build, does not run, or does not compute what it should.
    """
    if getattr(backend, "NEEDS_MODULE", False):
        backend.load_runtime()
        return f"{backend.version()}, the baseline of FP32: it runs the module itself, as a build exports it"
    target = Target(name="doctor", compute_capabilities=() if hardware.gpus() else (_AHEAD_OF_TIME,))
    engine = backend.build_engine(PROBE, folder, target=target, options=backend.Options())
    did = f"{engine.backend_version}, INT8 as {_scheme(backend.scheme(target))}"
    if (reason := backend.cannot_run(engine)) is not None:
        if not _is_for_others(backend, reason):
            raise MissingDependency(reason)
        return f"{did}; built an engine ahead of time; {reason}"
    with backend.open_session(folder / engine.path, threads=1) as session:
        outputs = session.run({"x": np.ones((1, 3, 8, 8), np.float32)})
    # One part in a hundred: OpenVINO and TensorRT may compute FP32 in BF16 or TF32.
    if not np.allclose(outputs["y"], _EXPECTED, rtol=1e-2):
        got = ", ".join(f"{value:.3f}" for value in outputs["y"].ravel())
        raise RdeployError(f"wrong result for a tiny network: {got} instead of 2.500, 5.000, 2.500")
    executed = ", ".join(f"{count} {precision}" for precision, count in engine.executed_precision)
    return f"{did}; built and ran a tiny network{f' ({executed})' if executed else ''}"


def _is_for_others(backend: Any, reason: str) -> bool:
    """Whether an engine that does not run here was built as it should be: for the GPU of another machine."""
    return getattr(backend, "AHEAD_OF_TIME", False) and (not hardware.gpus() or isinstance(reason, backends.Misfit))


def _scheme(scheme: Any) -> str:
    kind = "symmetric signed" if scheme.activations == "int8" else "affine unsigned"
    return kind if scheme.weight_max == 127 else f"{kind}, 7-bit weights (no VNNI here)"


def _lacking(name: str, reason: str) -> Diagnosis:
    """Return the verdict on a backend that misses something, with the command that installs it as its fix."""
    detail, _, fix = reason.rpartition("install it with: ")
    return _verdict(name, "fail", detail.rstrip(" ;") if detail else reason, fix if detail else "")


def _verdict(name: str, status: str, detail: str, fix: str = "") -> Diagnosis:
    return Diagnosis(name=name, kind="backend", status=status, detail=detail, fix=fix)


def _machine() -> tuple[Diagnosis, ...]:
    present = hardware.cpu_flags()
    flags = [flag for flag in hardware.FLAGS_THAT_MATTER if flag in present]
    quota, gpus = hardware.cpu_quota(), hardware.gpus()
    limit = hardware.memory_limit_bytes()
    memory = _gigabytes(hardware.memory_bytes()) + (f", limited to {_gigabytes(limit)}" if limit else "")
    devices = "; ".join(f"{gpu.name} ({gpu.compute_capability}, {_gigabytes(gpu.memory_bytes)})" for gpu in gpus)
    packages = ", ".join(f"{name} {version}" for name, version in environment.runtimes())
    facts = (
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("cpu", f"{hardware.cpu_model()}, {hardware.cores()} threads" + (f", quota {quota:g} CPUs" if quota else "")),
        ("cpu features", ", ".join(flags) or "none of those that speed up INT8"),
        ("memory", memory),
        ("board", hardware.jetson_model() or "not a Jetson"),
        ("gpu", f"{devices}, driver {hardware.driver_version()}" if gpus else "none that CUDA can see"),
        ("packages", packages),
    )
    return tuple(Diagnosis(name=name, kind="machine", status="info", detail=detail) for name, detail in facts)


def _gigabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
