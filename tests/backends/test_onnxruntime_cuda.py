import sys
from types import SimpleNamespace

import pytest

from rdeploy import hardware
from rdeploy.backends import _engine, _ort_cuda, onnxruntime, onnxruntime_cuda
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


def make_nvidia(tmp_path, monkeypatch):
    """Two folders of the import path with wheels of NVIDIA's, as where PyTorch was installed apart from ONNX Runtime."""
    for place, packages in (("one", ("cudnn",)), ("two", ("cu13", "nothing"))):
        for package in packages:
            (tmp_path / place / "nvidia" / package / ("lib" if package != "nothing" else "include")).mkdir(parents=True)
        monkeypatch.syspath_prepend(str(tmp_path / place))
    for name in [name for name in sys.modules if name.partition(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)


def test_cudas_libraries_are_loaded_from_pips_wheels_wherever_those_are(monkeypatch, tmp_path, capsys):
    make_nvidia(tmp_path, monkeypatch)
    folders = []

    def preload_dlls(directory=None):
        print("Failed to load libcudart.so.13: not here" if directory else "Failed to load libcufft.so.12: none")
        folders.append(directory)

    missing = _ort_cuda.preload(SimpleNamespace(preload_dlls=preload_dlls))

    here = [folder for folder in folders if folder is None or folder.startswith(str(tmp_path))]
    assert here == [str(tmp_path / "two/nvidia/cu13/lib"), str(tmp_path / "one/nvidia/cudnn/lib"), None]
    assert missing == "Failed to load libcufft.so.12: none"
    assert capsys.readouterr().out == ""


def test_an_onnx_runtime_before_1_21_loads_its_libraries_by_itself():
    assert _ort_cuda.preload(SimpleNamespace()) == ""


@pytest.mark.skipif(onnxruntime.unavailable() is not None, reason=str(onnxruntime.unavailable()))
def test_a_session_on_cuda_says_which_library_is_missing_and_one_on_the_cpu_looks_for_none(monkeypatch, tiny, tmp_path):
    path = tiny["write"](tmp_path / "m.onnx")
    asked = []
    monkeypatch.setattr(_ort_cuda, "preload", lambda ort: asked.append(ort) or "Failed to load libcudnn.so.9: none")

    with onnxruntime.open_session(path):
        assert asked == []
    if onnxruntime_cuda.unavailable() is None:
        pytest.skip("the CUDA provider works here")
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(StageError, match=r"here: Failed to load libcudnn.so.9: none; rdeploy's extra `gpu` brings"),
        onnxruntime_cuda.open_session(path),
    ):
        pass
