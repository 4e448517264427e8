import numpy as np
import pytest

from rdeploy import hardware
from rdeploy.backends import _trt_session
from rdeploy.errors import ConfigError, MissingDependency, StageError
from rdeploy.types import Engine


def engine(**facts):
    known = {
        "path": "e",
        "sha256": "",
        "size_bytes": 1,
        "backend": "tensorrt",
        "backend_version": "10.3",
        "build_s": 1.0,
    }
    return Engine(**{**known, "source_sha256": "", "built_for": ("sm_89",), **facts})


@pytest.fixture
def session(fake, fake_cuda, tmp_path):
    path = tmp_path / "tensorrt.engine"
    path.write_bytes(b"plan")
    flavour, _ = fake(10)
    return _trt_session.Session(path, flavour=lambda: flavour, runtime=lambda: fake_cuda)


def test_nothing_is_touched_before_a_session_is_entered(fake_cuda):
    def explode():
        raise RuntimeError("touched")

    _trt_session.Session("nowhere", flavour=explode, runtime=explode)


def test_a_run_copies_in_executes_and_copies_out(session):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)

    with session:
        first = session.run({"x": values})["y"]
        second = session.run({"x": values[:1] + 1})["y"]

    np.testing.assert_array_equal(first, 2 * values)
    np.testing.assert_array_equal(second, 2 * (values[:1] + 1))


def test_what_is_not_contiguous_is_fed_right(session):
    values = np.arange(12, dtype=np.float32).reshape(3, 4).T[:, ::1]

    with session:
        np.testing.assert_array_equal(session.run({"x": values[:2]})["y"], 2 * values[:2])


def test_inputs_and_outputs_are_known_while_the_session_is_open(session):
    with session:
        assert [(i.name, i.dtype, i.shape) for i in session.inputs] == [("x", "float32", (-1, 3))]
        assert [(o.name, o.dtype, o.shape) for o in session.outputs] == [("y", "float32", (-1, 3))]

    assert session.inputs == session.outputs == ()


def test_everything_is_given_back(session, fake_cuda):
    with session:
        for batch in (1, 4, 2):
            session.run({"x": np.zeros((batch, 3), np.float32)})
        assert fake_cuda.alive

    assert fake_cuda.alive == {}


def test_a_batch_outside_the_shape_range_is_refused(session):
    with session, pytest.raises(ConfigError, match=r"batch 5 is outside what .*tensorrt.engine was built for: 1 to 4"):
        session.run({"x": np.zeros((5, 3), np.float32)})


def test_a_cuda_error_is_one_line(session, fake_cuda):
    status = type("Status", (int,), {"name": "cudaErrorMemoryAllocation"})(2)

    with session:
        fake_cuda.fails = status
        with pytest.raises(StageError, match="run: cudaHostAlloc failed: out of memory"):
            session.run({"x": np.zeros((1, 3), np.float32)})
        fake_cuda.fails = None

    assert fake_cuda.alive == {}


def test_no_driver_is_a_missing_dependency(session, fake_cuda):
    fake_cuda.fails = type("Status", (int,), {"name": "cudaErrorInsufficientDriver"})(35)

    with session, pytest.raises(MissingDependency, match="needs an NVIDIA GPU and its driver: out of memory"):
        session.run({"x": np.zeros((1, 3), np.float32)})


@pytest.mark.parametrize("content", [b"garbage", b""])
def test_a_damaged_engine_is_told_from_a_missing_driver(session, content):
    session._path.write_bytes(content)

    with pytest.raises(ConfigError, match=r"tensorrt.engine is damaged, or no engine of this TensorRT: build it again"):
        session.__enter__()


def test_an_engine_does_not_run_without_a_gpu(monkeypatch):
    monkeypatch.setattr(hardware, "gpus", lambda: ())

    reason = _trt_session.cannot_run(engine(), title="TensorRT", version="10.3")

    assert reason == "running a TensorRT engine for sm_89 needs an NVIDIA GPU and its driver, and there is none here"


def test_an_engine_of_another_version_or_gpu_is_built_again(gpu):
    other_version = _trt_session.cannot_run(engine(), title="TensorRT", version="11.4")
    other_gpu = _trt_session.cannot_run(engine(built_for=("sm_90",)), title="TensorRT", version="10.3")

    assert other_version == "built with TensorRT 10.3, here is 11.4: build it again on this machine"
    assert other_gpu == "built for sm_90, and NVIDIA L4 is sm_89: build it again for this GPU"


def test_an_engine_for_this_gpu_runs(gpu):
    pytest.importorskip("cuda.bindings", reason="running needs cuda-python")

    assert _trt_session.cannot_run(engine(), title="TensorRT", version="10.3") is None
