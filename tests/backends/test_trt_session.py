import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest

from rdeploy import environment, hardware
from rdeploy.backends import _cuda, _trt_session
from rdeploy.errors import ConfigError, InvariantError, MissingDependency, StageError
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
    flavour, _ = fake("10.3")
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


@pytest.mark.parametrize(
    ("facts", "version", "reason"),
    [
        ({}, "11.4", "built for sm_89 / TensorRT 10.3, this is sm_89 / 11.4"),
        ({"built_for": ("sm_86",)}, "10.3", "built for sm_86 / TensorRT 10.3, this is sm_89 / 10.3"),
        ({"built_for": ("sm_86",)}, "11.4", "built for sm_86 / TensorRT 10.3, this is sm_89 / 11.4"),
        ({"built_for": ("sm_90+",)}, "10.3", "built for sm_90+ / TensorRT 10.3, this is sm_89 / 10.3"),
        ({"fingerprint": (("version_compatible", True),)}, "11.4", "this is sm_89 / 11.4"),
        ({"fingerprint": (("version_compatible", True),)}, "10.16", "this is sm_89 / 10.16"),
        ({"fingerprint": (("version_compatible", True), ("lean_runtime", True))}, "10.2", "this is sm_89 / 10.2"),
        (
            {"fingerprint": (("machine", "Linux aarch64"),)},
            "10.3",
            "built for sm_89 / TensorRT 10.3 / Linux aarch64, this is",
        ),
    ],
)
def test_what_an_engine_was_built_for_and_what_is_here_are_told(gpu, monkeypatch, facts, version, reason):
    monkeypatch.setattr(environment, "machine", lambda: "Linux x86_64")

    said = _trt_session.cannot_run(engine(**facts), title="TensorRT", version=version)

    assert reason in said
    assert said.endswith(": build it again on this machine")


@pytest.mark.parametrize(
    ("facts", "version"),
    [
        ({}, "10.3"),
        ({"built_for": ("sm_80+",)}, "10.3"),
        ({"fingerprint": (("version_compatible", True), ("lean_runtime", True))}, "10.16.1"),
        ({"built_for": ()}, "10.3"),
    ],
)
def test_an_engine_for_this_gpu_runs(gpu, facts, version):
    pytest.importorskip("cuda.bindings", reason="running needs cuda-python")

    assert _trt_session.cannot_run(engine(**facts), title="TensorRT", version=version) is None


def test_hardware_compatible_engines_do_not_run_on_jetson(gpu, monkeypatch):
    monkeypatch.setattr(hardware, "jetson_model", lambda: "NVIDIA Jetson AGX Orin")

    assert "built for sm_80+" in _trt_session.cannot_run(
        engine(built_for=("sm_80+",)), title="TensorRT", version="10.3"
    )


def batches(*sizes):
    return [np.full((size, 3), index, np.float32) for index, size in enumerate(sizes)]


def test_the_third_run_of_a_shape_launches_the_graph_that_the_second_recorded(session, fake_cuda):
    with session:
        for index, batch in enumerate(batches(2, 2, 2, 2)):
            np.testing.assert_array_equal(session.run({"x": batch})["y"], 2 * batch)
            assert fake_cuda.launches == max(0, index)

    assert fake_cuda.alive == {}


def test_every_shape_has_a_graph_of_its_own_and_new_memory_forgets_them(session, fake_cuda):
    with session:
        for batch in batches(2, 1, 2, 1, 2, 1, 4, 2, 2):
            np.testing.assert_array_equal(session.run({"x": batch})["y"], 2 * batch)

        # 2 and 1 are recorded at their second run and launched twice; 4 needs more memory, then 2 starts over.
        assert fake_cuda.launches == 2 + 2 + 1

    assert fake_cuda.alive == {}


def test_what_cannot_be_recorded_runs_call_by_call(session, fake_cuda):
    fake_cuda.capture_fails = True

    with session:
        for batch in batches(2, 2, 2):
            np.testing.assert_array_equal(session.run({"x": batch})["y"], 2 * batch)

    assert fake_cuda.launches == 0
    assert fake_cuda.alive == {}


def test_a_stream_of_batches_comes_back_in_order(session, fake_cuda):
    given = batches(2, 1, 4, 3, 2)

    with session:
        found = [made["y"] for made in session.stream({"x": batch} for batch in given)]

    assert len(found) == 5
    for batch, made in zip(given, found, strict=True):
        np.testing.assert_array_equal(made, 2 * batch)
    assert fake_cuda.alive == {}


@pytest.mark.parametrize(("sizes", "lanes"), [((2,), 1), ((2, 2, 2), 2)])
def test_a_second_lane_is_opened_for_a_second_batch(session, fake_cuda, sizes, lanes):
    with session:
        list(session.stream({"x": batch} for batch in batches(*sizes)))
        assert sum(str(name).startswith("stream") for name in fake_cuda.alive) == lanes


def test_without_the_memory_for_a_second_lane_a_stream_has_one(session, fake_cuda):
    with session:
        session._kernels.context = lambda: None
        found = [made["y"] for made in session.stream({"x": batch} for batch in batches(2, 1, 4))]
        assert sum(str(name).startswith("stream") for name in fake_cuda.alive) == 1

    for batch, made in zip(batches(2, 1, 4), found, strict=True):
        np.testing.assert_array_equal(made, 2 * batch)


def test_a_stream_that_is_left_early_leaves_the_session_usable(session, fake_cuda):
    with session:
        stream = session.stream({"x": batch} for batch in batches(1, 1, 1, 1))
        next(stream)
        stream.close()
        np.testing.assert_array_equal(session.run({"x": np.ones((1, 3), np.float32)})["y"], np.full((1, 3), 2.0))

    assert fake_cuda.alive == {}


@pytest.fixture
def made(fake, fake_cuda, tmp_path):
    def make(version, content=b"plan", **how):
        path = tmp_path / "bundle" / "engines" / "tensorrt" / "tensorrt.engine"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        flavour, calls = fake(version, **how)
        return _trt_session.Session(path, flavour=lambda: flavour, runtime=lambda: fake_cuda), calls

    return make


def test_a_batch_takes_the_profile_that_is_tuned_nearest_to_it(made):
    session, calls = made("10.3", ranges=((1, 1, 1), (2, 8, 8), (1, 32, 32)))

    with session:
        for size in (1, 8, 7, 32, 1):
            session.run({"x": np.ones((size, 3), np.float32)})
        with pytest.raises(ConfigError, match="batch 33 is outside what .* was built for: 1 to 1, 2 to 8, 1 to 32"):
            session.run({"x": np.ones((33, 3), np.float32)})

    assert [call[1] for call in calls if call[0] == "context.set_optimization_profile_async"] == [1, 2, 0]


def test_an_8_6_engine_of_others_is_streamed_one_batch_at_a_time(made, gpu):
    session, _ = made("8.6")

    with session:
        found = [one["y"] for one in session.stream({"x": batch} for batch in batches(2, 1, 4))]

    for batch, one in zip(batches(2, 1, 4), found, strict=True):
        np.testing.assert_array_equal(one, 2 * batch)


def test_rtx_keeps_the_kernels_that_it_compiled(made, gpu, tmp_path):
    for kept in (b"+kernels", b"+kernels+kernels"):  # the fake's cache gains "+kernels" whenever it is written
        session, calls = made("rtx")
        with session:
            session.run({"x": np.ones((1, 3), np.float32)})
        assert ("runtime_config.set_runtime_cache", kept) in calls

    (kept,) = (tmp_path / "cache" / "kernels").iterdir()
    assert kept.read_bytes() == b"+kernels+kernels"
    assert kept.name.endswith("-1.7.1.116-sm_89.cache")


def test_an_engine_with_host_code_is_opened_only_with_consent(made, gpu, monkeypatch):
    session, _ = made("10.3", content=b"lean")
    with pytest.raises(
        ConfigError, match="brings host code that runs when it is opened; RDEPLOY_TRUST_ENGINE_CODE=1 allows"
    ):
        session.__enter__()

    monkeypatch.setenv("RDEPLOY_TRUST_ENGINE_CODE", "1")
    session, calls = made("10.3")
    with session:
        assert ("runtime.engine_host_code_allowed", True) in calls


def test_8_x_is_not_touched_without_a_driver(made, monkeypatch):
    monkeypatch.setattr(hardware, "gpus", lambda: ())
    session, calls = made("8.6")

    with pytest.raises(MissingDependency, match="running a TensorRT engine needs an NVIDIA GPU"):
        session.__enter__()
    assert calls == []


def test_how_an_engine_is_opened_is_read_strictly(made):
    session, _ = made("10.3")
    session._path.with_name("tensorrt.engine.opening").write_text('{"dla_cores": 1}')

    with pytest.raises(ConfigError, match=r"tensorrt.engine.opening: unknown key 'dla_cores'"):
        session.__enter__()


def stripped(session, onnx_place, content=b"onnx"):
    sidecar = session._path.with_name("tensorrt.engine.refit")
    sidecar.write_text(json.dumps({"onnx_sha256": hashlib.sha256(b"onnx").hexdigest()}))
    onnx_place.parent.mkdir(parents=True, exist_ok=True)
    onnx_place.write_bytes(content)


@pytest.mark.parametrize("place", ["model.onnx", "graphs/tensorrt.onnx", "engines/tensorrt/model.onnx"])
def test_stripped_weights_are_put_back_from_the_bundles_graph(made, tmp_path, place):
    session, calls = made("11.4")
    stripped(session, tmp_path / "bundle" / place)

    with session:
        assert ("refit_parser.refit_from_file", str(tmp_path / "bundle" / place)) in calls
        assert ("refitter.refit_cuda_engine",) in calls


def test_stripped_weights_of_another_graph_are_not_taken(made, tmp_path):
    session, _ = made("11.4")
    stripped(session, tmp_path / "bundle" / "model.onnx", b"another")

    with pytest.raises(
        ConfigError, match="built without weights, and the ONNX file that holds them is not in its bundle"
    ):
        session.__enter__()


def test_the_gpus_own_clock_runs_along_when_it_is_started(session, fake_cuda):
    values = np.zeros((2, 3), np.float32)

    with session:
        session.run({"x": values})
        assert session.device_clock == ""
        session.time_device()
        found = []
        for _ in range(3):  # the last one is a graph
            session.run({"x": values})
            found.append(session.device_ms)
        assert session.device_clock.startswith("CUDA events")
        assert session.transfers_ms({"x": values}) == {"upload": 0.25, "download": 0.25}
        np.testing.assert_array_equal(session.run({"x": values + 1})["y"], 2 * (values + 1))

    assert found == [0.5, 0.5, 0.5]
    assert fake_cuda.launches > 0
    assert fake_cuda.alive == {}


def test_a_clock_that_was_not_started_tells_nothing(session):
    with session, pytest.raises(InvariantError, match="the device's clock was not started"):
        _ = session.device_ms


def test_a_context_is_made_by_a_call_that_does_nothing_else():
    calls = []
    runtime = SimpleNamespace(cudaFree=lambda address: (calls.append(address), (0,))[1])

    _cuda.make_context(runtime)

    assert calls == [0]
