from types import SimpleNamespace

import pytest

from rdeploy import hardware
from rdeploy.backends import _engine, onnxruntime, onnxruntime_cuda
from rdeploy.errors import StageError


def test_without_a_gpu_there_is_nothing_to_run_on(monkeypatch):
    monkeypatch.setattr(_engine, "missing", lambda *names: None)
    monkeypatch.setattr(hardware, "gpus", lambda: ())

    assert onnxruntime_cuda.unavailable() == (
        "ONNX Runtime's CUDA provider needs an NVIDIA GPU and its driver, and there is none here"
    )


@pytest.mark.parametrize(("providers", "fine"), [(["CPUExecutionProvider"], False), (["CUDAExecutionProvider"], True)])
def test_the_package_for_cpus_is_told_from_that_with_cuda(monkeypatch, gpu, providers, fine):
    monkeypatch.setattr(_engine, "missing", lambda *names: None)
    monkeypatch.setattr(_engine, "load", lambda *names: SimpleNamespace(get_available_providers=lambda: providers))

    reason = onnxruntime_cuda.unavailable()

    assert (reason is None) == fine
    assert fine or reason.endswith("install it with: pip uninstall onnxruntime && pip install onnxruntime-gpu")


@pytest.mark.skipif(onnxruntime.unavailable() is not None, reason=str(onnxruntime.unavailable()))
def test_a_silent_fallback_to_the_cpu_is_an_error(tiny, tmp_path):
    path = tiny["write"](tmp_path / "m.onnx")
    if onnxruntime_cuda.unavailable() is None:
        pytest.skip("the CUDA provider works here")

    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(StageError, match="ONNX Runtime does not load its CUDAExecutionProvider here"),
        onnxruntime_cuda.open_session(path),
    ):
        pass
