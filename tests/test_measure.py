"""Warm-up, summaries and verdicts, against closed forms and seeded distributions."""

import numpy as np
import pytest

from rdeploy import measure
from rdeploy.errors import ConfigError, InvariantError
from rdeploy.measured import Measurement, Memory
from rdeploy.types import Timing


class Machine:
    """A clock in nanoseconds that only a run moves: by the next latency, the last one for ever."""

    def __init__(self, *latencies_ms):
        self.latencies, self.now, self.runs = list(latencies_ms), 0, 0

    def run(self):
        self.now += int(self.latencies[min(self.runs, len(self.latencies) - 1)] * 1e6)
        self.runs += 1

    def clock(self):
        return self.now


def test_warm_up_ends_when_three_windows_agree():
    machine = Machine(10.0)

    found = measure.warm_up(machine.run, max_s=3.0, clock=machine.clock)

    assert found == measure.WarmUp(runs=15, stable=True, median_ms=10.0)


def test_warm_up_goes_on_while_it_gets_faster():
    machine = Machine(*[20.0] * 6, *[10.0])

    found = measure.warm_up(machine.run, max_s=3.0, clock=machine.clock)

    assert found.stable
    assert found.median_ms == 10.0
    assert found.runs == 6 + 15


def test_warm_up_gives_up_at_the_ceiling_and_says_so():
    machine = Machine(*[float(10 + i) for i in range(1000)])

    found = measure.warm_up(machine.run, max_s=1.0, clock=machine.clock)

    assert not found.stable
    assert machine.now >= 1e9
    assert machine.now <= 1.2e9


def test_a_very_slow_engine_is_run_once_at_least():
    machine = Machine(5000.0)

    assert measure.warm_up(machine.run, max_s=1.0, clock=machine.clock) == measure.WarmUp(
        runs=1, stable=False, median_ms=5000.0
    )


def test_timed_runs_are_single_runs():
    machine = Machine(1.0, 2.0, 3.0)

    assert measure.timed_runs(machine.run, 3, clock=machine.clock) == [1.0, 2.0, 3.0]


def test_timed_runs_leave_the_garbage_collector_as_it_was(monkeypatch):
    import gc

    states = []

    def failing():
        states.append(gc.isenabled())
        raise RuntimeError

    with pytest.raises(RuntimeError):
        measure.timed_runs(failing, 1)

    assert states == [False]
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("latency_ms", "expected"), [(0.01, 12), (1.0, 12), (4.0, 5), (19.0, 2), (20.0, 1), (500.0, 1), (0.0, 12)]
)
def test_blocks_are_about_twenty_milliseconds_and_at_least_sixteen(latency_ms, expected):
    assert measure.runs_per_block(latency_ms, Timing()) == expected


@pytest.mark.parametrize(("latency_ms", "expected"), [(5.0, 12), (50.0, 4), (200.0, 1), (500.0, 1)])
def test_an_engine_that_is_measured_alone_runs_two_hundred_milliseconds_at_a_time(latency_ms, expected):
    assert measure.runs_per_block(latency_ms, Timing(), alone=True) == expected


def test_summary_is_the_closed_form():
    found = measure.summary([float(x) for x in range(1, 1002)], batch=4)

    assert found["samples"] == 1001
    assert (found["p50_ms"], found["p90_ms"], found["p95_ms"], found["p99_ms"]) == (501.0, 901.0, 951.0, 991.0)
    assert found["mean_ms"] == 501.0
    assert found["throughput_ips"] == pytest.approx(4 * 1000 / 501)
    assert found["cov"] == pytest.approx(np.std(np.arange(1, 1002), ddof=1) / 501)
    assert found["reasons"] == {}


@pytest.mark.parametrize(("name", "needed"), [("p90_ms", 64), ("p95_ms", 130), ("p99_ms", 662)])
def test_a_percentile_needs_its_samples(name, needed):
    short, enough = measure.summary([1.0] * (needed - 1)), measure.summary([1.0] * needed)

    assert short[name] is None
    assert short["reasons"][name] == f"needs at least {needed} samples, there are {needed - 1}"
    assert enough[name] == 1.0
    assert name not in enough["reasons"]


def test_summary_of_one_sample_claims_no_spread():
    found = measure.summary([2.0])

    assert (found["p50_ms"], found["throughput_ips"], found["cov"], found["drift"]) == (2.0, 500.0, None, None)


def test_nothing_cannot_be_summarised():
    with pytest.raises(InvariantError, match="a measurement without samples cannot be summarised"):
        measure.summary([])


def test_drift_compares_the_ends():
    assert measure.drift([1.0] * 10 + [5.0] * 10 + [1.1] * 10) == pytest.approx(0.1)
    assert measure.is_steady([1.0] * 10 + [5.0] * 10 + [1.04] * 10)
    assert not measure.is_steady([1.0] * 10 + [1.1] * 20)
    assert measure.is_steady([1.0, 9.0])


def blocks(rng, noise_of_round, *, latency_ms=5.0, runs=4):
    """Latencies as a machine gives them: a round's disturbance, an own one, a skewed tail, some outliers."""
    rounds = len(noise_of_round)
    base = latency_ms * noise_of_round[:, None] * np.exp(rng.normal(0, 0.01, (rounds, 1)))
    found = base * (1 + rng.gamma(1.0, 0.02, (rounds, runs)))
    found[rng.random((rounds, runs)) < 0.02] *= 2.0
    return found.tolist()


def test_the_same_engine_twice_is_nearly_always_inconclusive():
    verdicts = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        disturbed = np.exp(rng.normal(0, 0.05, 24))
        verdicts.append(measure.speedup(blocks(rng, disturbed), blocks(rng, disturbed), seed=seed)[2])

    assert verdicts.count("inconclusive") >= 190


@pytest.mark.parametrize(("latency_ms", "verdict"), [(4.5, "faster"), (5.5, "slower")])
def test_ten_percent_are_found(latency_ms, verdict):
    found = []
    for seed in range(50):
        rng = np.random.default_rng(seed)
        disturbed = np.exp(rng.normal(0, 0.05, 24))
        other = blocks(rng, disturbed, latency_ms=latency_ms)
        ratio, (low, high), said = measure.speedup(blocks(rng, disturbed), other, seed=seed)
        found.append(said)
        assert low <= ratio <= high

    assert found.count(verdict) >= 48


def test_the_interval_holds_the_true_ratio_as_often_as_it_says():
    held = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        disturbed = np.exp(rng.normal(0, 0.05, 30))
        slow = blocks(rng, disturbed, latency_ms=10.0)
        _, (low, high), _ = measure.speedup(slow, blocks(rng, disturbed), seed=seed)
        held.append(low <= 2.0 <= high)

    assert np.mean(held) >= 0.95


def test_a_seed_gives_the_same_interval():
    rng = np.random.default_rng(0)
    pair = blocks(rng, np.ones(12)), blocks(rng, np.ones(12))

    assert measure.speedup(*pair, seed=1) == measure.speedup(*pair, seed=1)


@pytest.mark.parametrize(
    ("baseline", "variant", "expected"),
    [
        (2.0, 1.0, (2.0, (2.0, 2.0), "faster")),
        (1.0, 2.0, (0.5, (0.5, 0.5), "slower")),
        (1.0, 1.0, (1.0, (1.0, 1.0), "inconclusive")),
    ],
)
def test_constant_latencies_have_no_spread(baseline, variant, expected):
    assert measure.speedup([[baseline]] * 8, [[variant]] * 8, seed=0) == expected


@pytest.mark.parametrize(("latency_ms", "verdict"), [(99.5, "inconclusive"), (100.5, "inconclusive"), (98.0, "faster")])
def test_a_difference_that_two_processes_of_one_engine_show_is_no_verdict(latency_ms, verdict):
    assert measure.speedup([[100.0]] * 8, [[latency_ms]] * 8, seed=0)[2] == verdict


def test_one_constant_side_is_no_trouble():
    rng = np.random.default_rng(0)

    ratio, (low, high), verdict = measure.speedup([[10.0]] * 12, blocks(rng, np.ones(12)), seed=0)

    assert low <= ratio <= high
    assert verdict == "faster"


def test_too_few_pairs_carry_no_verdict():
    assert measure.speedup([[10.0], [30.0]], [[5.0], [10.0]], seed=0) == (20.0 / 7.5, (2.0, 3.0), "inconclusive")


def test_blocks_without_a_partner_are_left_out():
    assert measure.speedup([[2.0]] * 8 + [[90.0]] * 8, [[1.0]] * 8, seed=0)[0] == 2.0


def test_a_speedup_needs_both_sides():
    with pytest.raises(InvariantError, match="at least one block of each side"):
        measure.speedup([[1.0]], [], seed=0)


def test_what_makes_samples_doubtful_is_said():
    rng = np.random.default_rng(0)
    two = np.tile([5.0, 5.0, 5.0, 8.0, 8.0], 40) + rng.normal(0.0, 0.05, 200)

    said = measure.summary(two.tolist())["warnings"]

    assert said[0] == "two speeds, 5 and 8 ms, 40% of the runs took the longer one: the median is one of the two"
    assert said[1] == "the latencies vary by 24% (standard deviation over mean)"
    assert measure.summary([1.0] * 30 + [1.2] * 30)["warnings"][0] == (
        "the latency drifted by +20% while it was measured"
    )
    assert measure.summary(rng.normal(5.0, 0.05, 200).tolist())["warnings"] == ()


class Camera(Machine):
    """A machine that also sleeps: its clock is moved by runs and by waiting."""

    def sleep(self, seconds):
        self.now += round(seconds * 1e9)


def test_a_pace_waits_for_every_frame():
    camera = Camera(4.0)

    latencies, late = measure.paced_runs(camera.run, 5, fps=100, clock=camera.clock, sleep=camera.sleep)

    assert (latencies, late) == ([4.0] * 5, 0)
    assert camera.now == 5 * 10_000_000 + 4_000_000


def test_an_engine_slower_than_the_camera_is_late_and_drops_frames():
    camera = Camera(12.0)

    latencies, late = measure.paced_runs(camera.run, 5, fps=100, clock=camera.clock, sleep=camera.sleep)

    # It answers every second frame, which came 20 ms after the one before.
    assert (latencies, late) == ([12.0] * 5, 5)
    assert camera.now == 10_000_000 + 4 * 20_000_000 + 12_000_000


def measurement(**fields):
    memory = Memory(weights=None, activations=None, workspace=None, process_peak=None)
    known = {"batch": 1, "threads": 1, "latencies_ms": (1.0,), "warmup": 3, "stable": True, "memory": memory}
    return Measurement(**{**known, **fields})


def test_latencies_of_two_definitions_are_not_compared():
    measure.check_comparable(measurement(), measurement(batch=2))

    with pytest.raises(ConfigError, match="two definitions of latency cannot be compared: 'wall .*' and 'CUDA events'"):
        measure.check_comparable(measurement(), measurement(definition="CUDA events"))


@pytest.mark.parametrize(
    ("points", "knee"),
    [
        ([(1, 100.0), (2, 180.0), (4, 195.0), (8, 200.0)], 4),
        ([(8, 200.0), (1, 190.0)], 1),
        ([(1, 100.0), (2, 50.0)], 1),
        ([(1, 100.0)], None),
        ([], None),
    ],
)
def test_the_knee_is_the_smallest_batch_with_nearly_all_of_the_throughput(points, knee):
    assert measure.knee(points) == knee
