"""Snapshots over time in SQLite: trends per machine, change points, and writers that do not hurt each other."""

import subprocess
import sys

import pytest

from rdeploy import history
from rdeploy.errors import ConfigError
from rdeploy.snapshot import EngineFacts, Launch, Share, Snapshot, Speedup


def snapshot(ms=1.0, *, cpu="an EPYC", name="net r6-int8"):
    engine = EngineFacts(
        backend="onnxruntime",
        size_bytes=1000,
        launches=(Launch(blocks_ms=((ms,) * 4,), process_peak_bytes=10),),
        speedup=Speedup(value=2.0, ci95=(1.9, 2.1), memory_ratio=0.5),
        accuracy=Share(right=9, samples=10),
    )
    return Snapshot(name=name, machine={"cpu": cpu}, counts={"macs": 100}, engines=(engine,))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "history.sqlite"


def test_what_was_added_is_listed_oldest_first(file):
    history.add(file, snapshot(), label="b", at="2026-02-01", verdict="pass")
    history.add(file, snapshot(name="other"), label="a", at="2026-01-01")

    assert [(run.label, run.name, run.verdict) for run in history.runs(file)] == [
        ("a", "other", ""),
        ("b", "net r6-int8", "pass"),
    ]
    assert [run.label for run in history.runs(file, name="other")] == ["a"]


@pytest.mark.parametrize(
    ("metric", "value"),
    [("latency", 1.0), ("throughput", 1000.0), ("memory", 10.0), ("speedup", 2.0), ("memory_ratio", 0.5),
     ("accuracy", 0.9), ("macs", 100.0), ("size", 1000.0)],
)  # fmt: skip
def test_every_metric_has_a_trend(file, metric, value):
    history.add(file, snapshot())

    (trend,) = history.trends(file, metric)

    assert trend.values == pytest.approx((value,))


def test_a_trend_says_where_it_changed(file):
    for day in range(20):
        history.add(file, snapshot(1.0 if day < 12 else 1.2), label=f"c{day}", at=f"2026-01-{day + 1:02}")

    (trend,) = history.trends(file, "latency", backend="onnxruntime")

    assert [trend.runs[index].label for index in trend.changes] == ["c12"]
    assert [level for _, _, level in trend.levels] == pytest.approx([1.0, 1.2])


def test_times_of_different_machines_are_never_one_trend(file):
    history.add(file, snapshot(cpu="an EPYC"))
    history.add(file, snapshot(cpu="a Xeon"))

    assert len(history.trends(file, "latency")) == 2
    assert len(history.trends(file, "speedup")) == 1


def test_two_processes_add_at_once_and_nothing_is_lost(file):
    program = (
        "import sys; from rdeploy import history; from rdeploy.snapshot import Snapshot\n"
        "for i in range(40): history.add(sys.argv[1], Snapshot(name='n', counts={'macs': i}), label=sys.argv[2])"
    )
    children = [subprocess.Popen([sys.executable, "-c", program, str(file), label]) for label in ("x", "y")]

    assert [child.wait(timeout=120) for child in children] == [0, 0]

    labels = [run.label for run in history.runs(file)]
    assert (labels.count("x"), labels.count("y")) == (40, 40)
    assert len(history.trends(file, "macs")[0].values) == 80


@pytest.mark.parametrize("call", [history.runs, lambda path: history.trends(path, "macs")])
def test_a_history_that_is_not_there_is_said(file, call):
    with pytest.raises(ConfigError, match=r"no such history; `rdeploy history add` makes one"):
        call(file)


def test_an_unknown_metric_names_those_there_are(file):
    history.add(file, Snapshot(name="n", counts={"macs": 1}))

    with pytest.raises(ConfigError, match=r"no metric 'mac' in this history; there are: macs"):
        history.trends(file, "mac")


def test_a_file_that_is_no_history_is_refused(file):
    file.write_bytes(b"not a database, but long enough to look at" * 100)

    with pytest.raises(ConfigError, match="cannot be used as a history"):
        history.add(file, Snapshot(name="n"))
