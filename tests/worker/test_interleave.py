"""Engines measured against each other: each in its own process, in turn, and one's trouble is not another's."""

import importlib.util

import numpy as np
import pytest

from rdeploy import measure, serde, worker
from rdeploy.errors import ConfigError
from rdeploy.types import Preprocessing, Timing
from rdeploy.worker import jobs
from rdeploy.worker.interleave import measure_interleaved

QUICK = Timing(min_samples=32, max_samples=48, min_time_s=0.0, max_time_s=5.0, max_warmup_s=0.05)


@pytest.fixture
def measured(tmp_path, fake):
    """Return `measured({name: how}, **fields) -> {name: Measured}` of fake engines, measured from this process."""

    def run(engines, *, entries=None, timing=QUICK, **fields):
        extra = entries or {}
        made = tuple(
            jobs.Entry(name=n, backend="fake", path=str(fake(f"{n}.fake", **how)), **extra.get(n, {}))
            for n, how in engines.items()
        )
        job = jobs.MeasureJob(entries=made, timing=timing, **fields)
        return {m.name: m for m in measure_interleaved(job, directory=tmp_path)}

    return run


def test_every_engine_gets_its_samples_in_the_same_rounds(measured):
    found = measured({"one": {"sleep_s": 0.001}, "two": {"sleep_s": 0.002}}, seed=3)

    one, two = found["one"], found["two"]
    assert one.failure is None
    assert two.failure is None
    assert len(one.blocks) == len(two.blocks) == 16
    assert {len(block) for block in one.blocks} == {2}
    assert one.measurement.latencies_ms == tuple(x for block in one.blocks for x in block)
    assert min(one.measurement.latencies_ms) >= 1.0
    assert min(two.measurement.latencies_ms) >= 2.0
    assert one.measurement.warmup >= 3
    assert one.measurement.load is not None
    assert dict(one.details)["runs_per_block"] == 2


def test_each_ceiling_ends_its_engine_and_the_others_go_on(measured):
    timing = Timing(min_samples=16, max_samples=160, min_time_s=0.1, max_time_s=0.2, max_warmup_s=0.0)

    found = measured({"fast": {}, "slow": {"sleep_s": 0.004}}, timing=timing)

    fast = found["fast"].measurement.latencies_ms
    assert len(fast) == 160 or sum(fast) >= 100.0  # on a busy machine the time floor may come first
    assert sum(found["slow"].measurement.latencies_ms) >= 200.0
    assert len(found["slow"].measurement.latencies_ms) <= 50


def test_the_time_ceiling_leaves_at_least_one_block(measured):
    timing = Timing(min_samples=32, max_samples=48, min_time_s=0.0, max_time_s=0.0, max_warmup_s=0.0)

    found = measured({"slow": {"sleep_s": 0.01}}, timing=timing)

    assert len(found["slow"].blocks) == 1
    assert found["slow"].measurement.stable is False


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"open": "refuse"}, "Unsupported", "the fake does not know this op; leave it out"),
        ({"run": "raise", "good_runs": 10}, "RuntimeError", "RuntimeError: vendor trouble"),
        ({"open": "abort"}, "crash", "crashed with SIGABRT; log: "),
        ({"run": "exit"}, "crash", "ended with exit code 0; log: "),
    ],
)
def test_an_engine_in_trouble_does_not_take_the_others_down(measured, how, error, message):
    timing = Timing(min_samples=32, max_samples=48, min_time_s=0.0, max_time_s=5.0, max_warmup_s=0.0)

    found = measured({"bad": how, "good": {}}, timing=timing)

    assert found["good"].failure is None
    assert len(found["good"].measurement.latencies_ms) >= 32
    assert found["bad"].measurement is None
    assert (found["bad"].failure.stage, found["bad"].failure.error) == ("measure", error)
    assert message in found["bad"].failure.message


def test_an_engine_that_hangs_is_stopped(measured, tmp_path, gone):
    found = measured({"bad": {"open": "hang", "pid_file": tmp_path / "pids"}, "good": {}}, timeout_s=5.0)

    assert found["bad"].failure.error == "hang"
    assert found["bad"].failure.message.startswith("did not answer within 5 s and was stopped; log: ")
    assert found["good"].measurement is not None
    assert gone(tmp_path / "pids")


def test_what_vendors_print_does_not_reach_the_protocol(measured, tmp_path):
    found = measured({"loud": {"open": "chatter"}})

    assert found["loud"].failure is None
    log = (tmp_path / "session-0.log").read_text()
    assert "vendor on stdout" in log
    assert "vendor on fd 1" in log
    assert "vendor in C" in log


def test_peak_memory_is_each_engines_own(measured):
    size = 96_000_000
    account = {"weights_bytes": size, "activation_bytes": 0}

    found = measured({"big": {"allocate_bytes": size}, "small": {}}, entries={"big": account, "small": account})

    big, small = (found[name].measurement.memory for name in ("big", "small"))
    assert big.process_peak - small.process_peak == pytest.approx(size, rel=0.05)
    assert big.weights == size
    assert big.workspace < 0.05 * size
    assert small.workspace == 0
    assert dict(small.method)["workspace"].endswith("negative, shown as 0")
    details = dict(found["big"].details)
    assert details["after_open_bytes"] - details["before_open_bytes"] == pytest.approx(size, rel=0.05)


def test_images_and_batches_reach_the_engine(measured, pixels):
    data = jobs.Pixels(pixels=str(pixels), preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3))

    found = measured(
        {"half": {"dtype": "float16", "batch": 16}, "dynamic": {}},
        entries={"half": {"batch": 16}, "dynamic": {"batch": 2}},
        input=data,
    )

    assert found["half"].measurement.batch == 16
    assert found["dynamic"].measurement.batch == 2


def test_a_batch_that_the_engine_does_not_take_is_one_sentence(measured):
    found = measured({"four": {"batch": 4}})

    assert found["four"].failure.message.endswith("four.fake takes batches of 4, not 1; measure it at that batch")


@pytest.mark.parametrize("names", [(), ("a", "a")])
def test_entries_need_different_names(tmp_path, names):
    entries = tuple(jobs.Entry(name=name, backend="fake", path="x") for name in names)

    with pytest.raises(ConfigError, match="a measure job needs entries with different names"):
        measure_interleaved(jobs.MeasureJob(entries=entries), directory=tmp_path)


def test_the_measure_job_runs_in_a_child_and_comes_back_as_json(tmp_path, fake):
    entries = [{"name": n, "backend": "fake", "path": fake(f"{n}.fake", sleep_s=0.001)} for n in ("a", "b")]
    job = {"job": "measure", "entries": entries, "timing": serde.to_json(QUICK), "threads": 1, "seed": 0, "input": None}

    result = worker.call(job, directory=tmp_path / "job", timeout_s=60.0)

    found = [serde.from_json(jobs.Measured, entry) for entry in result["entries"]]
    assert [m.name for m in found] == ["a", "b"]
    assert found[0].measurement.threads == 1
    ratio, (low, high), verdict = measure.speedup(found[0].blocks, found[1].blocks, seed=0)
    assert low <= ratio <= high
    assert verdict in ("faster", "slower", "inconclusive")


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")), reason="needs onnx and onnxruntime"
)
def test_a_real_engine_is_built_verified_and_measured(tmp_path, pixels):
    from rdeploy.types import Target

    write_onnx(tmp_path / "tiny.onnx")
    verify = {"pixels": pixels, "preprocessing": serde.to_json(Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3))}
    job = {
        "job": "engine",
        "backend": "onnxruntime",
        "onnx": tmp_path / "tiny.onnx",
        "directory": tmp_path / "engines",
        "target": serde.to_json(Target(name="cpu")),
        "verify": verify,
        "outputs": tmp_path / "outputs.npy",
    }

    built = worker.call(job, directory=tmp_path / "build", timeout_s=120.0)
    entry = {"name": "ort", "backend": "onnxruntime", "path": tmp_path / "engines" / built["engine"]["path"]}
    timed = worker.call(
        {"job": "measure", "entries": [entry], "timing": serde.to_json(QUICK)},
        directory=tmp_path / "measure",
        timeout_s=120.0,
    )

    expected = (np.load(pixels) / 255.0).mean(axis=(1, 2))
    np.testing.assert_allclose(np.load(tmp_path / "outputs.npy").reshape(11, 3), expected, rtol=1e-5)
    assert built["verification"]["passed"]
    assert len(timed["entries"][0]["measurement"]["latencies_ms"]) >= 32


def write_onnx(path):
    """Write y = global average pool of x, (n, 3, 4, 4) -> (n, 3)."""
    import onnx
    from onnx import TensorProto, helper

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 4, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])
    nodes = [helper.make_node("GlobalAveragePool", ["x"], ["p"]), helper.make_node("Flatten", ["p"], ["y"])]
    graph = helper.make_graph(nodes, "tiny", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def test_the_engines_processes_end_with_a_measure_job_that_is_stopped(tmp_path, fake, gone):
    entry = {"name": "stuck", "backend": "fake", "path": fake(open="wait", pid_file=tmp_path / "pids")}

    with pytest.raises(worker.JobFailed, match="measure: did not finish within 6 s"):
        worker.call({"job": "measure", "entries": [entry]}, directory=tmp_path / "job", timeout_s=6.0)

    assert gone(tmp_path / "pids")
