"""Where the lean runtime of another version is found, and what a real runtime says of a library that is none."""

from types import SimpleNamespace

import pytest

from rdeploy import hardware
from rdeploy.backends import _trt, _trt_opening, tensorrt_rtx


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """Install the wheel of a lean runtime of 10.16.1."""
    file = tmp_path / "tensorrt_lean_libs" / "libnvinfer_lean.so.10"
    file.parent.mkdir()
    file.touch()

    def distribution(name):
        if name != "tensorrt-lean-cu12-libs":
            raise _trt_opening.importlib.metadata.PackageNotFoundError(name)
        return SimpleNamespace(version="10.16.1.11", locate_file=lambda path: tmp_path / path)

    monkeypatch.setattr(_trt_opening.importlib.metadata, "distribution", distribution)
    return file


def test_a_lean_runtime_is_taken_from_its_wheel_where_it_is_of_that_version(wheel):
    assert _trt_opening.lean_library("10.16.1.11") == wheel
    assert _trt_opening.lean_library("10.13.0.35") is None


def test_a_lean_runtime_among_the_systems_libraries_comes_first(wheel, monkeypatch, tmp_path):
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere:{tmp_path}")
    (tmp_path / "libnvinfer_lean.so.10.16.1").touch()

    assert _trt_opening.lean_library("10.16.1.11") == tmp_path / "libnvinfer_lean.so.10.16.1"


def test_a_version_that_is_none_leads_to_no_library(wheel, monkeypatch, tmp_path):
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    (tmp_path / "libnvinfer_lean.so.evil").touch()

    assert _trt_opening.lean_library("evil") is None


@pytest.mark.skipif(tensorrt_rtx.unavailable() is not None, reason=str(tensorrt_rtx.unavailable()))
def test_a_real_runtime_gives_none_for_a_library_that_is_no_lean_runtime(monkeypatch, tmp_path):
    if hardware.gpus():
        pytest.skip("there is a GPU here: its runtime is left alone")
    library = tmp_path / "libnvinfer_lean.so.1.6.0"
    library.write_bytes(b"no library")
    monkeypatch.setattr(_trt_opening, "lean_library", lambda version: library)
    flavour = tensorrt_rtx._flavour()

    *_, last = _trt_opening.runtimes(
        flavour.trt, _trt.logger_of(flavour), _trt_opening.Opening(lean_version="1.6.0"), trusted=False
    )

    assert last is None
    assert any("Unable to load library" in message for _, message in _trt.logger_of(flavour).recent)
