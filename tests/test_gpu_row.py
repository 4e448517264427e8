"""Every kind of row of the GPU check, run on fakes whose times and bytes are known."""

import json
import runpy
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rdeploy import backends, hardware, machine
from rdeploy.backends import _cuda, _engine, _trt, _trt_session, tensorrt
from rdeploy.types import Engine, TensorInfo

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FAKE = runpy.run_path(str(Path(__file__).parent / "backends" / "fake_trt.py"))
MIB = 1 << 20


@pytest.fixture
def row(monkeypatch):
    """The script, with few samples."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_row

    monkeypatch.setattr(gpu_row, "WARM_S", 0.0)
    monkeypatch.setattr(gpu_row, "SAMPLES", 5)
    return gpu_row


@pytest.fixture
def cuda(monkeypatch):
    """The fake CUDA behind `cuda.bindings`, on a machine with an H100; every look finds 10 MiB less free."""
    runtime = FAKE["FakeCuda"]()
    free = iter(range(1000 * MIB, 0, -10 * MIB))
    runtime.cudaMemGetInfo = lambda: (FAKE["Status"](0), next(free), 1 << 30)
    monkeypatch.setattr(hardware, "gpus", lambda: (hardware.Gpu("NVIDIA H100", "sm_90", 80 << 30),))
    monkeypatch.setattr(machine, "gpu", lambda: None)
    known = {"cuda.bindings.runtime": runtime}
    load = _engine.load
    monkeypatch.setattr(_engine, "load", lambda name, *words: known.get(name) or load(name, *words))
    return runtime


def reference(tmp_path, outputs):
    np.save(tmp_path / "reference.npy", outputs)
    return str(tmp_path / "reference.npy")


def test_tensorrt_is_timed_twice_and_its_memory_counted(row, cuda, monkeypatch, tmp_path):
    flavour = _trt.Flavour("tensorrt", "TensorRT", FAKE["make_trt"]("8.6", [], ranges=((1, 2, 4),)))
    asked = {}

    def build_engine(onnx, directory, *, target, options):
        asked.update(onnx=onnx, batch_sizes=target.batch_sizes, tactic_sources=options.tactic_sources)
        (directory / "tensorrt.engine").write_bytes(b"plan")
        return Engine(
            path="tensorrt.engine", sha256="", size_bytes=4, backend="tensorrt", backend_version="8.6.0",
            source_sha256="", build_s=1.5, executed_precision=(("int8", 3),),
        )  # fmt: skip

    monkeypatch.setattr(tensorrt, "build_engine", build_engine)
    monkeypatch.setattr(tensorrt, "open_session", lambda path: SizedSession(path, flavour=lambda: flavour))
    monkeypatch.setattr(row, "images", lambda job: np.ones((2, 3), np.float32))
    job = {"runtime": "tensorrt", "onnx": "m.onnx", "batch": 2, "stubs": True}

    found = row.tensorrt_row({**job, "reference": reference(tmp_path, np.full((1, 3), 2.0))})

    assert asked == {"onnx": Path("m.onnx"), "batch_sizes": (2,), "tactic_sources": ()}
    # The fake device takes a quarter of a millisecond for each of the two copies, and nothing for the network.
    assert (found["p50_ms"], found["independent_ms"], found["back_to_back_ms"]) == (0.5, 0.5, 0.5)
    assert (found["samples"], found["independent"], found["graph"]) == (5, "CUDA events by hand", True)
    assert found["sqnr_db"] > 300
    assert found["memory"]["method"].startswith("cudaMemGetInfo")
    assert found["memory"]["ran"] > found["memory"]["opened"] > 0
    assert (found["memory"]["context"], found["executed"], found["version"]) == (7 * MIB, {"int8": 3}, "8.6.0")
    json.dumps(found)


class SizedSession(_trt_session.Session):
    """A session whose engine says what memory it takes, as a real one does."""

    def __enter__(self):
        super().__enter__()
        self.engine.device_memory_size = 7 * MIB
        return self


class FakeTorch(types.ModuleType):
    """As much of PyTorch as a row asks for; a run takes 3 ms of the device's time."""

    float16, float32, __version__ = "half", "single", "2.99"

    def __init__(self, runtime):
        super().__init__("torch")
        self.clock, self.compiled, self.runtime = 0.0, 0, runtime
        switch = SimpleNamespace(allow_tf32=True)
        self.backends = SimpleNamespace(cuda=SimpleNamespace(matmul=switch), cudnn=switch)
        free = iter(range(900 * MIB, 0, -MIB))
        self.cuda = SimpleNamespace(
            init=lambda: None, mem_get_info=lambda: (next(free), 1 << 30), synchronize=lambda: None,
            Event=lambda enable_timing: FakeEvent(self), max_memory_reserved=lambda: 5 * MIB,
            current_stream=lambda: SimpleNamespace(cuda_stream=0),
        )  # fmt: skip
        self.inference_mode = lambda: FakeMode()

    def from_numpy(self, array):
        return SimpleNamespace(to=lambda device, kind: FakeTensor(array))

    def compile(self, module):
        self.compiled += 1
        return module

    def module(self, given):
        self.runtime._pass(3.0)
        return FakeTensor(2 * given.array)


class FakeMode:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


class FakeEvent:
    def __init__(self, torch):
        self.torch = torch

    def record(self):
        self.at = self.torch.runtime.clock_ms

    def elapsed_time(self, other):
        return other.at - self.at


class FakeTensor:
    def __init__(self, array):
        self.array = array

    def float(self):
        return self

    cpu = float

    def numpy(self):
        return self.array


@pytest.mark.parametrize(("runtime", "compiled"), [("torch", 0), ("torch_compile", 1)])
def test_pytorch_is_timed_by_its_own_events_by_hand_and_by_do_bench(
    row, cuda, monkeypatch, tmp_path, runtime, compiled
):
    torch = FakeTorch(cuda)
    testing = types.ModuleType("triton.testing")
    testing.do_bench = lambda run, **how: run() and 2.9
    networks = types.ModuleType("gpu_networks")
    networks.module = lambda network, size: (SimpleNamespace(to=lambda device, kind: torch.module), size)
    for name, module in (
        ("torch", torch), ("triton", types.ModuleType("triton")), ("triton.testing", testing), ("gpu_networks", networks),
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    job = {"runtime": runtime, "network": "resnet50", "size": 4, "batch": 1, "precision": "fp16"}
    given = row.images(job)

    found = row.torch_row({**job, "reference": reference(tmp_path, 2 * given)})

    assert (found["p50_ms"], found["independent_ms"], found["back_to_back_ms"]) == (3.0, 3.0, 3.0)
    assert (found["do_bench_ms"], found["version"], torch.compiled) == (2.9, "2.99", compiled)
    assert torch.backends.cudnn.allow_tf32 is False
    assert (found["memory"]["opened"], found["memory"]["rdeploy_opened"]) == (3 * MIB, MIB)  # each look loses one
    assert found["sqnr_db"] > 300
    json.dumps(found)


def test_onnxruntime_has_wall_time_and_says_so(row, cuda, monkeypatch, tmp_path):
    info = TensorInfo(name="x", dtype="float32", shape=(1, 3, 4, 4))

    class Session(FakeMode):
        inputs = outputs = (info,)

        def run(self, given):
            return {"x": 3 * given["x"]}

    plugin = SimpleNamespace(unavailable=lambda: None, version=lambda: "1.30", open_session=lambda path: Session())
    monkeypatch.setattr(backends, "find", lambda name: plugin)
    job = {"runtime": "onnxruntime_cuda", "onnx": "m.onnx", "size": 4, "batch": 2}

    found = row.onnxruntime_row({**job, "reference": reference(tmp_path, 3 * row.images(job)[:1])})

    assert (found["clock"], found["version"], found["samples"]) == ("wall, with copies", "1.30", 5)
    assert "independent_ms" not in found
    assert found["sqnr_db"] > 300
    plugin.unavailable = lambda: "no CUDA provider in this onnxruntime"
    with pytest.raises(SystemExit, match="no CUDA provider"):
        row.onnxruntime_row(job)


def test_the_account_holds_what_was_lost_since_it_was_made(row, monkeypatch):
    free = iter([1000, 1000, 1000, 400, 380])
    used = iter([70, 100, 690])
    gpu = SimpleNamespace(state=lambda: SimpleNamespace(memory_used_bytes=0), used_by_bytes=lambda pid: next(used))
    monkeypatch.setattr(machine, "gpu", lambda: gpu)

    account = row.Account(lambda: next(free))
    account.look("opened")
    account.look("ran")

    assert account.facts["method"].startswith("NVML")
    assert (account.facts["opened"], account.facts["rdeploy_opened"]) == (0, 30)
    assert (account.facts["ran"], account.facts["rdeploy_ran"]) == (0, 620)


def test_outputs_are_compared_with_the_reference_on_as_many_images_as_it_has(row, tmp_path):
    exact = np.array([[3.0, 4.0]])
    job = {"reference": reference(tmp_path, exact)}

    assert row.agreement(job, np.array([[3.0, 4.5], [9.0, 9.0]])) == pytest.approx(10 * np.log10(25 / 0.25))
    assert row.agreement({}, exact) is None


def test_the_hand_takes_the_mean_of_its_launches(row, cuda):
    hand = row.Hand(_cuda.Cuda(cuda), 0)

    assert hand.ms(lambda: cuda._pass(1.5)) == 1.5
    assert hand.ms(lambda: cuda._pass(2.0), 4) == 2.0
