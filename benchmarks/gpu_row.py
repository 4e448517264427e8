"""Measure one row of the GPU check in a process of its own: a JSON job on stdin, one JSON line on stdout.

Latency is device time of one synchronous run, as rdeploy tells it (for PyTorch: `torch.cuda.Event`). The independent timer is
CUDA events made by hand through cuda-python on the same stream, run by run in turn with ours, so that a clock that drifts
moves both; what 100 launches take back to back, and `triton.testing.do_bench`, are told beside it. Memory is what
cudaMemGetInfo lost since the context was made, beside what rdeploy's own account says. Outputs are compared with those of
ONNX Runtime on the CPU.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
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


class Hand:
    """CUDA events of our own, on a stream that somebody else made."""

    def __init__(self, cuda: Any, stream: int) -> None:
        self.cuda, self.stream = cuda, stream
        self.first, self.last = (cuda.call("cudaEventCreate") for _ in range(2))

    def ms(self, launch: Callable[[], object], times: int = 1) -> float:
        """Return what a launch takes on the device, as the mean of `times` without a pause."""
        self.cuda.call("cudaEventRecord", self.first, self.stream)
        for _ in range(times):
            launch()
        self.cuda.call("cudaEventRecord", self.last, self.stream)
        self.cuda.call("cudaEventSynchronize", self.last)
        return float(self.cuda.call("cudaEventElapsedTime", self.first, self.last)) / times


class Account:
    """GPU memory since this was made, by cudaMemGetInfo and by rdeploy's own account."""

    def __init__(self, free: Callable[[], int]) -> None:
        from rdeploy import machine, memory

        self._free = free
        self._ours = memory.DeviceMemory(machine.gpu(), free=free)
        self._free_before, self._ours_before = free(), self._ours.read()
        self.facts: dict[str, Any] = {"method": self._ours.method}

    def look(self, name: str) -> None:
        """Keep under `name` what cudaMemGetInfo lost, and under `rdeploy_name` what rdeploy says."""
        ours = self._ours.read()
        self.facts[name] = self._free_before - self._free()
        if ours is not None and self._ours_before is not None:
            self.facts[f"rdeploy_{name}"] = ours - self._ours_before


def images(job: dict[str, Any]) -> np.ndarray:
    shape = (job["batch"], 3, job["size"], job["size"])
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def summary(times: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """Return medians of our own timer and of the one by hand, where there is one, with further facts."""
    found = {name: value for name, value in times.items() if name not in ("device_ms", "by_hand_ms")}
    found |= {"p50_ms": statistics.median(times["device_ms"]), "samples": len(times["device_ms"])}
    if times.get("by_hand_ms"):
        found |= {"independent_ms": statistics.median(times["by_hand_ms"]), "independent": "CUDA events by hand"}
    return {**found, **facts}


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
    account = Account(lambda: cuda.free_and_total_bytes()[0])
    plugin = backends.find(job["runtime"])
    options = {"tactic_sources": ()} if job["runtime"] == "tensorrt" and job.get("stubs") else {}
    target = Target(name="gpu-check", batch_sizes=(job["batch"],))
    with tempfile.TemporaryDirectory() as folder:
        engine = plugin.build_engine(Path(job["onnx"]), Path(folder), target=target, options=plugin.Options(**options))
        with plugin.open_session(Path(folder) / engine.path) as session:
            account.look("opened")
            times, made = timed(cuda, session, images(job))
            account.look("ran")
            context = getattr(session.engine, "device_memory_size_v2", None) or session.engine.device_memory_size
    return summary(
        times, version=engine.backend_version, build_s=engine.build_s, engine_bytes=engine.size_bytes,
        executed=dict(engine.executed_precision), sqnr_db=agreement(job, made), notes=list(engine.notes),
        memory={**account.facts, "context": int(context)},
    )  # fmt: skip


def timed(cuda: Any, session: Any, pixels: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """Return the times of a session's runs, ours and by hand in turn, and its outputs."""
    given = {session.inputs[0].name: pixels.astype(session.inputs[0].dtype)}
    session.time_device()
    made = session.run(given)[session.outputs[0].name]
    warm(lambda: session.run(given))
    lane = session._lanes[0]
    graph = next(iter(lane._graphs.values()), None)
    launch = lane._enqueue if graph is None else lambda: graph.launch(lane._stream)
    hand = Hand(cuda, lane._stream)
    found: dict[str, Any] = {"device_ms": [], "by_hand_ms": [], "graph": graph is not None}
    for _ in range(SAMPLES):
        session.run(given)
        found["device_ms"].append(session.device_ms)
        found["by_hand_ms"].append(hand.ms(launch))
    found["back_to_back_ms"] = statistics.median(hand.ms(launch, LAUNCHES) for _ in range(5))
    return found, made


def torch_row(job: dict[str, Any]) -> dict[str, Any]:
    """Run the module as its users do: eager or compiled, FP32 without TF32 or all in FP16."""
    import gpu_networks
    import torch

    from rdeploy.backends import _cuda

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.cuda.init()
    account = Account(lambda: torch.cuda.mem_get_info()[0])
    kind = torch.float16 if job["precision"] == "fp16" else torch.float32
    module, _ = gpu_networks.module(job["network"], job["size"])
    module = module.to("cuda", kind)
    run = torch.compile(module) if job["runtime"] == "torch_compile" else module
    given = torch.from_numpy(images(job)).to("cuda", kind)
    account.look("opened")
    found: dict[str, Any] = {"device_ms": [], "by_hand_ms": []}
    with torch.inference_mode():
        made = run(given).float().cpu().numpy()
        warm(lambda: (run(given), torch.cuda.synchronize()))
        hand = Hand(_cuda.Cuda(_cuda.load()), torch.cuda.current_stream().cuda_stream)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(SAMPLES):
            first.record()
            run(given)
            last.record()
            torch.cuda.synchronize()
            found["device_ms"].append(first.elapsed_time(last))
            found["by_hand_ms"].append(hand.ms(lambda: run(given)))
        found["back_to_back_ms"] = statistics.median(hand.ms(lambda: run(given), LAUNCHES) for _ in range(5))
        account.look("ran")
        from triton.testing import do_bench

        found["do_bench_ms"] = do_bench(lambda: run(given), warmup=100, rep=500, return_mode="median")
    memory = {**account.facts, "context": torch.cuda.max_memory_reserved()}
    return summary(found, version=torch.__version__, sqnr_db=agreement(job, made), memory=memory)


def onnxruntime_row(job: dict[str, Any]) -> dict[str, Any]:
    """Run the graph on the CUDA provider; it has no clock of the device, so this is wall time with the copies."""
    from rdeploy import backends
    from rdeploy.backends import _cuda

    cuda = _cuda.Cuda(_cuda.load())
    _cuda.make_context()
    account = Account(lambda: cuda.free_and_total_bytes()[0])
    plugin = backends.find("onnxruntime_cuda")
    if reason := plugin.unavailable():
        raise SystemExit(reason)
    given = images(job)
    with plugin.open_session(Path(job["onnx"])) as session:
        account.look("opened")
        feed = {session.inputs[0].name: given.astype(session.inputs[0].dtype)}
        made = session.run(feed)[session.outputs[0].name]
        warm(lambda: session.run(feed))
        times = []
        for _ in range(SAMPLES):
            start = time.perf_counter()
            session.run(feed)
            times.append((time.perf_counter() - start) * 1000.0)
        account.look("ran")
    return summary(
        {"device_ms": times}, clock="wall, with copies", version=plugin.version(), sqnr_db=agreement(job, made),
        memory=account.facts,
    )  # fmt: skip


if __name__ == "__main__":
    main()
