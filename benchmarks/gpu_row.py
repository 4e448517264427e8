"""Measure one row of the GPU check in a process of its own: a JSON job on stdin, one JSON line on stdout.

Latency is device time where the runtime tells it, checked against an independent timer: `triton.testing.do_bench` for
PyTorch, CUDA events by hand around many launches of the same work for TensorRT. Memory is cudaMemGetInfo before the runtime
was loaded, after the engine was opened, and after it ran. Outputs are compared with those of ONNX Runtime on the CPU.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

WARM_S, SAMPLES, LAUNCHES = 0.5, 200, 100


def main() -> None:
    job = json.load(sys.stdin)
    measure = {"torch": torch_row, "torch_compile": torch_row, "onnxruntime_cuda": onnxruntime_row}.get(
        job["runtime"], tensorrt_row
    )
    print(json.dumps(measure(job)))


def images(job: dict[str, Any]) -> np.ndarray:
    shape = (job["batch"], 3, job["size"], job["size"])
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def summary(device_ms: list[float], **facts: Any) -> dict[str, Any]:
    return {"p50_ms": statistics.median(device_ms), "samples": len(device_ms), **facts}


def agreement(job: dict[str, Any], made: np.ndarray) -> float | None:
    """Return the SQNR in dB of the outputs against the reference's, None where there is none."""
    if not job.get("reference"):
        return None
    exact = np.load(job["reference"]).astype(np.float64)
    noise = np.sum((made[: len(exact)].astype(np.float64) - exact) ** 2)
    return float(10 * np.log10(np.sum(exact**2) / max(noise, 1e-30)))


def warm(run: Any) -> None:
    end = time.perf_counter() + WARM_S
    run()
    while time.perf_counter() < end:
        run()


def tensorrt_row(job: dict[str, Any]) -> dict[str, Any]:
    """Build and run a TensorRT engine through rdeploy's own backend; `runtime` is tensorrt or tensorrt_rtx."""
    from rdeploy import backends
    from rdeploy.backends import _cuda
    from rdeploy.types import Target

    cuda = _cuda.Cuda(_cuda.load())
    _cuda.make_context()
    before = cuda.free_and_total_bytes()[0]
    plugin = backends.find(job["runtime"])
    options = {"tactic_sources": ()} if job["runtime"] == "tensorrt" and job.get("stubs") else {}
    target = Target(name="gpu-check", batch_sizes=(job["batch"],))
    with tempfile.TemporaryDirectory() as folder:
        engine = plugin.build_engine(Path(job["onnx"]), Path(folder), target=target, options=plugin.Options(**options))
        pixels = images(job)
        with plugin.open_session(Path(folder) / engine.path) as session:
            given = {session.inputs[0].name: pixels.astype(session.inputs[0].dtype)}
            opened = cuda.free_and_total_bytes()[0]
            session.time_device()
            made = session.run(given)[session.outputs[0].name]
            warm(lambda: session.run(given))
            device_ms = []
            for _ in range(SAMPLES):
                session.run(given)
                device_ms.append(session.device_ms)
            ran = cuda.free_and_total_bytes()[0]
            by_hand = back_to_back_ms(cuda, session)
            context = getattr(session.engine, "device_memory_size_v2", None) or session.engine.device_memory_size
    return summary(
        device_ms, independent_ms=by_hand, independent="CUDA events by hand, 100 launches back to back",
        version=engine.backend_version, build_s=engine.build_s, engine_bytes=engine.size_bytes,
        executed=dict(engine.executed_precision), sqnr_db=agreement(job, made), notes=list(engine.notes),
        memory={"opened": before - opened, "ran": before - ran, "context": int(context)},
    )  # fmt: skip


def back_to_back_ms(cuda: Any, session: Any) -> float:
    """Return the mean time of the same work between two events of our own, launched without a pause."""
    lane = session._lanes[0]
    first, last = (cuda.call("cudaEventCreate") for _ in range(2))
    times = []
    for _ in range(5):
        cuda.call("cudaEventRecord", first, lane._stream)
        for _ in range(LAUNCHES):
            graph = next(iter(lane._graphs.values()), None)
            graph.launch(lane._stream) if graph is not None else lane._enqueue()
        cuda.call("cudaEventRecord", last, lane._stream)
        cuda.call("cudaStreamSynchronize", lane._stream)
        times.append(float(cuda.call("cudaEventElapsedTime", first, last)) / LAUNCHES)
    for event in (first, last):
        cuda.call("cudaEventDestroy", event)
    return statistics.median(times)


def torch_row(job: dict[str, Any]) -> dict[str, Any]:
    """Run the module as its users do: eager or compiled, FP32 without TF32 or all in FP16."""
    import gpu_networks
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.cuda.init()
    before = torch.cuda.mem_get_info()[0]
    kind = torch.float16 if job["precision"] == "fp16" else torch.float32
    module, _ = gpu_networks.module(job["network"], job["size"])
    module = module.to("cuda", kind)
    run = torch.compile(module) if job["runtime"] == "torch_compile" else module
    given = torch.from_numpy(images(job)).to("cuda", kind)
    opened = torch.cuda.mem_get_info()[0]
    with torch.inference_mode():
        made = run(given).float().cpu().numpy()
        warm(lambda: (run(given), torch.cuda.synchronize()))
        device_ms = []
        for _ in range(SAMPLES):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            run(given)
            last.record()
            torch.cuda.synchronize()
            device_ms.append(first.elapsed_time(last))
        from triton.testing import do_bench

        independent = do_bench(lambda: run(given), warmup=100, rep=500, return_mode="median")
    ran = before - torch.cuda.mem_get_info()[0]
    return summary(
        device_ms, independent_ms=independent, independent="triton.testing.do_bench", version=torch.__version__,
        sqnr_db=agreement(job, made),
        memory={"opened": before - opened, "ran": ran, "context": torch.cuda.max_memory_reserved()},
    )  # fmt: skip


def onnxruntime_row(job: dict[str, Any]) -> dict[str, Any]:
    """Run the graph on the CUDA provider; it has no clock of the device, so this is wall time with the copies."""
    from rdeploy import backends
    from rdeploy.backends import _cuda

    cuda = _cuda.Cuda(_cuda.load())
    _cuda.make_context()
    before = cuda.free_and_total_bytes()[0]
    plugin = backends.find("onnxruntime_cuda")
    if reason := plugin.unavailable():
        raise SystemExit(reason)
    given = images(job)
    with plugin.open_session(Path(job["onnx"])) as session:
        opened = cuda.free_and_total_bytes()[0]
        feed = {session.inputs[0].name: given.astype(session.inputs[0].dtype)}
        made = session.run(feed)[session.outputs[0].name]
        warm(lambda: session.run(feed))
        times = []
        for _ in range(SAMPLES):
            start = time.perf_counter()
            session.run(feed)
            times.append((time.perf_counter() - start) * 1000.0)
        ran = cuda.free_and_total_bytes()[0]
    return summary(
        times, clock="wall, with copies", version=plugin.version(), sqnr_db=agreement(job, made),
        memory={"opened": before - opened, "ran": before - ran},
    )  # fmt: skip


if __name__ == "__main__":
    main()
