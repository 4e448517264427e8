"""What an engine is asked beyond latency, through the child that holds it."""

import importlib.util

import numpy as np
import pytest
from PIL import Image

from rdeploy.types import Preprocessing, Timing
from rdeploy.worker import jobs
from rdeploy.worker.interleave import measure_interleaved

MOMENT = Timing(min_samples=16, max_samples=16, min_time_s=0.0, max_time_s=1.0, max_warmup_s=0.0)


@pytest.fixture
def ask(tmp_path, fake):
    """Return `ask(how, entry=..., **asked) -> Measured` of one fake engine."""

    def run(how, *, entry=None, threads=1, **asked):
        one = jobs.Entry(name="one", backend="fake", path=str(fake("one.fake", **how)), **(entry or {}))
        asked = jobs.Asked(**{"seconds": 0.1, **asked})
        job = jobs.MeasureJob(entries=(one,), timing=MOMENT, threads=threads, asked=asked)
        (found,) = measure_interleaved(job, directory=tmp_path)
        assert found.failure is None
        return found

    return run


def test_nothing_is_measured_that_was_not_asked_for(ask):
    found = ask({}).measurement

    assert (found.energy, found.throughput, found.paced, found.layers, found.end_to_end) == (None, (), None, None, None)
    assert (found.scenarios, found.notes) == ((), ())
    assert found.device_latencies_ms == ()
    assert found.device_clock.startswith("none: a CPU has no clock but the wall's")
    assert dict(found.machine)["load_before"] == found.load


def test_a_devices_own_clock_is_read_beside_the_wall(ask):
    found = ask({"device_ms": 0.5}).measurement

    assert found.device_latencies_ms == (0.5,) * len(found.latencies_ms)
    assert found.device_clock == "the fake's own watch"


def test_energy_without_a_meter_is_none_with_the_reason(ask, monkeypatch):
    energy = ask({}, energy=True).measurement.energy

    assert (energy.joules_per_run is None) == (energy.runs == 0)
    assert energy.method


def test_streams_side_by_side_get_more_done_than_one(ask):
    one, four = ask({"sleep_s": 0.01}, streams=(1, 4), seconds=0.5).measurement.throughput

    assert (one.streams, one.threads, four.streams, four.threads) == (1, 1, 4, 1)
    assert one.images_per_s == one.runs / one.seconds
    assert one.images_per_s <= 100.0
    assert one.p50_ms >= 10.0
    assert 2.0 * one.runs < four.runs <= 4 * 51


def test_a_camera_waits_and_what_that_costs_has_an_interval(ask):
    paced = ask({"sleep_s": 0.001}, fps=100.0).measurement.paced

    assert paced.fps == 100.0
    assert len(paced.paced_ms) == 8 * 5
    assert len(paced.back_to_back_ms) == 8 * 5
    assert min(paced.paced_ms) >= 1.0
    assert paced.idle_cost_ci95[0] <= paced.idle_cost <= paced.idle_cost_ci95[1]
    assert paced.verdict in ("slower", "faster", "inconclusive")


def test_a_backend_without_a_profiler_says_so(ask):
    found = ask({}, layers=True).measurement

    assert found.layers is None
    assert found.notes == ("layers: fake has no profiler of its own: no times by layer",)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.full((9, 12, 3), 128, np.uint8)).save(path)
    return str(path)


def test_end_to_end_is_split_into_its_stages(ask, photo):
    preprocessing = Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3)

    found = ask({"device_ms": 0.5}, entry={"preprocessing": preprocessing}, images=(photo,), seconds=0.0)

    stages = found.measurement.end_to_end
    assert stages.images == 1
    assert len(stages.decode_ms) == len(stages.preprocess_ms) == len(stages.inference_ms) == 10
    assert min(*stages.decode_ms, *stages.preprocess_ms, *stages.inference_ms) > 0.0
    assert (stages.upload_ms, stages.download_ms) == ((0.25,) * 10, (0.125,) * 10)


def test_an_engine_that_takes_pictures_is_fed_pictures(ask, photo):
    entry = {"preprocessing": Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3)}

    found = ask({"dtype": "uint8", "sides": (4, 6, 3)}, entry=entry, images=(photo,), seconds=0.0).measurement

    assert found.notes == ()
    assert len(found.end_to_end.inference_ms) == 10


def test_without_preprocessing_there_is_no_end_to_end(ask, photo):
    found = ask({}, images=(photo,)).measurement

    assert found.end_to_end is None
    assert found.notes == ("end to end: an ONNX file does not say how it wants its images: end to end needs a bundle",)


def test_a_crash_while_asked_leaves_the_latencies_and_ends_the_asking(ask, photo):
    found = ask({"run": "exit", "good_runs": 30}, fps=1000.0, streams=(1,), layers=True, images=(photo,)).measurement

    assert len(found.latencies_ms) == 16
    assert (found.paced, found.layers) == (None, None)
    (note,) = found.notes
    assert note.startswith("streams: ended with exit code 0") or note.startswith("pace: ended with exit code 0")


@pytest.mark.skipif(importlib.util.find_spec("mlperf_loadgen") is None, reason="needs mlcommons-loadgen")
def test_mlperfs_own_load_generator_and_its_logs(ask, tmp_path):
    found = ask(
        {"sleep_s": 0.001},
        entry={"batch": 1},
        scenarios=("SingleStream", "Offline"),
        logs=str(tmp_path / "logs"),
        seconds=0.2,
    ).measurement

    single, offline = found.scenarios
    assert (single.scenario, single.metric) == ("SingleStream", "90th percentile latency, ms")
    assert single.value >= 1.0
    assert (offline.scenario, offline.metric) == ("Offline", "samples a second")
    assert 0.0 < offline.value <= 1000.0
    for one in (single, offline):
        assert (tmp_path / "logs" / f"one-{one.scenario}" / "mlperf_log_detail.txt").is_file()
        assert dict(one.summary)["Scenario"] == one.scenario
