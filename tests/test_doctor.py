import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rdeploy import backends, doctor, hardware
from rdeploy.backends import onnxruntime
from rdeploy.errors import StageError


def test_the_probe_is_what_its_script_makes():
    onnx = pytest.importorskip("onnx", reason="reads the probe")
    make_probe = runpy.run_path(str(Path(__file__).with_name("make_probe.py")))["make_probe"]

    assert onnx.load(doctor.PROBE) == make_probe()


def test_every_backend_and_the_machine_are_diagnosed():
    diagnoses = doctor.diagnose()

    assert [d.name for d in diagnoses if d.kind == "backend"] == list(backends.names())
    assert {"python", "cpu", "cpu features", "memory", "gpu"} <= {d.name for d in diagnoses if d.kind == "machine"}
    for diagnosis in diagnoses:
        assert diagnosis.status in ("pass", "fail", "info")
        assert diagnosis.detail
        assert "\n" not in diagnosis.detail


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "reference"])
def test_a_pass_has_built_and_run_a_network(name):
    if (reason := backends.find(name).unavailable()) is not None:
        pytest.skip(reason)

    diagnosis = doctor.examine(name)

    assert diagnosis.status == "pass", diagnosis
    assert "built and ran a tiny network" in diagnosis.detail
    assert backends.find(name).version() in diagnosis.detail


def test_tensorrt_rtx_passes_without_a_gpu_by_building_ahead_of_time(monkeypatch):
    if (reason := backends.find("tensorrt_rtx").unavailable()) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(hardware, "gpus", lambda: ())

    diagnosis = doctor.examine("tensorrt_rtx")

    assert diagnosis.status == "pass", diagnosis
    assert (
        "built an engine ahead of time; running a TensorRT-RTX engine for sm_89 needs an NVIDIA GPU" in diagnosis.detail
    )


def test_an_absent_package_fails_with_the_exact_command(monkeypatch):
    monkeypatch.setattr(onnxruntime, "unavailable", lambda: "X is not installed here; install it with: pip install x")

    diagnosis = doctor.examine("onnxruntime")

    assert (diagnosis.status, diagnosis.detail, diagnosis.fix) == ("fail", "X is not installed here", "pip install x")


def test_a_reason_without_a_command_is_told_whole(monkeypatch):
    monkeypatch.setattr(onnxruntime, "unavailable", lambda: "there is no GPU here")

    diagnosis = doctor.examine("onnxruntime")

    assert (diagnosis.status, diagnosis.detail, diagnosis.fix) == ("fail", "there is no GPU here", "")


def broken_backend(monkeypatch, **replaced):
    class Session:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def run(self, inputs):
            return {"y": np.full((1, 3), 7.0, np.float32)}

    def build_engine(onnx, directory, *, target, options):
        return SimpleNamespace(backend_version="1.0", path="e", executed_precision=())

    parts = {
        "INSTALL": "pip install broken",
        "Options": dict,
        "unavailable": lambda: None,
        "scheme": onnxruntime.scheme,
        "build_engine": build_engine,
        "cannot_run": lambda engine: None,
        "open_session": lambda path, threads: Session(),
    }
    monkeypatch.setattr(backends, "find", lambda name: SimpleNamespace(**{**parts, **replaced}))


def test_a_wrong_result_fails(monkeypatch):
    broken_backend(monkeypatch)

    diagnosis = doctor.examine("broken")

    assert diagnosis.status == "fail"
    assert diagnosis.detail == "wrong result for a tiny network: 7.000, 7.000, 7.000 instead of 2.500, 5.000, 2.500"
    assert diagnosis.fix == "reinstall it: pip install broken"


def test_a_failing_build_fails_with_its_reason(monkeypatch):
    def build_engine(onnx, directory, *, target, options):
        raise StageError("build", "no kernel")

    broken_backend(monkeypatch, build_engine=build_engine)

    assert doctor.examine("broken").detail == "build: no kernel"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(hardware, "gpus", lambda: (hardware.Gpu("NVIDIA L4", "sm_89", 24 << 30),))


CUDA_IS_MISSING = "cuda-python is not installed here; install it with: pip install cuda-python"


@pytest.mark.parametrize("ahead_of_time", [False, True])
def test_a_gpu_without_what_runs_an_engine_on_it_fails_with_the_exact_command(monkeypatch, gpu, ahead_of_time):
    broken_backend(monkeypatch, AHEAD_OF_TIME=ahead_of_time, cannot_run=lambda engine: CUDA_IS_MISSING)

    diagnosis = doctor.examine("broken")

    assert (diagnosis.status, diagnosis.detail) == ("fail", "cuda-python is not installed here")
    assert diagnosis.fix == "pip install cuda-python"


@pytest.mark.parametrize(("ahead_of_time", "status"), [(False, "fail"), (True, "pass")])
def test_only_what_builds_ahead_of_time_passes_without_running(monkeypatch, ahead_of_time, status):
    monkeypatch.setattr(hardware, "gpus", lambda: ())
    broken_backend(monkeypatch, AHEAD_OF_TIME=ahead_of_time, cannot_run=lambda engine: "there is no GPU here")

    assert doctor.examine("broken").status == status


def test_an_engine_for_another_gpu_is_what_was_asked_of_a_build_ahead_of_time(monkeypatch, gpu):
    misfit = backends.Misfit("built for sm_80, this is sm_90")
    broken_backend(monkeypatch, AHEAD_OF_TIME=True, cannot_run=lambda engine: misfit)

    assert doctor.examine("broken").status == "pass"


def test_seven_bit_weights_are_mentioned(monkeypatch):
    if onnxruntime.unavailable() is not None:
        pytest.skip(onnxruntime.unavailable())
    monkeypatch.setattr(hardware, "multiplies_int8_without_saturating", lambda: False)

    assert "7-bit weights (no VNNI here)" in doctor.examine("onnxruntime").detail
