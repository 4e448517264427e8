"""The record of a run: it survives, it is shared, and it says whose it is."""

import contextlib
import fcntl
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from rdeploy.errors import ConfigError
from rdeploy.run_store import RunStore
from rdeploy.search import Candidate, Evidence, Interval, Point
from rdeploy.types import QuantOptions, Variant

VARIANT = Variant(resolution=(168, 168), precision="int8", quant=QuantOptions())
CANDIDATE = Candidate(variant=VARIANT, macs=5, drop=Interval(value=1.0, low=0.5, high=2.0), images=32)
EVIDENCE = Evidence(
    point=Point(variant=VARIANT, backend="openvino"), macs=5, drop=CANDIDATE.drop,
    latency_ms=Interval(value=2.0, low=1.9, high=2.1), throughput_ips=500.0, memory_bytes=7, size_bytes=3,
)  # fmt: skip


def test_what_was_written_is_there_in_another_process(tmp_path):
    store = RunStore(tmp_path)
    store.keep_candidate(CANDIDATE, ruled_out="too slow")
    assert store.claim(EVIDENCE.point.id)
    store.settle(EVIDENCE.point.id, EVIDENCE)

    again = RunStore(tmp_path)

    assert again.candidates() == {"r168-int8": (CANDIDATE, "too slow")}
    assert again.evidence() == (EVIDENCE,)


FACTS = {"options": "a", "judged images": "b", "this machine's gpu": "c"}


def test_a_run_is_tied_to_all_that_decides_it_and_what_differs_is_said(tmp_path):
    store = RunStore(tmp_path)
    store.belongs_to(FACTS, resume=False)
    store.keep_candidate(CANDIDATE)

    store.belongs_to(FACTS, resume=True)
    with pytest.raises(ConfigError, match="holds this run already; go on with --resume"):
        store.belongs_to(FACTS, resume=False)
    other = "holds the run of another request; what is not the same: judged images, this machine's gpu; choose another --out"
    with pytest.raises(ConfigError, match=other):
        store.belongs_to({**FACTS, "judged images": "x", "this machine's gpu": "y"}, resume=True)


def test_a_record_in_which_nothing_was_found_is_taken_over_once_its_process_is_gone(tmp_path):
    begin = f"RunStore(Path(sys.argv[1])).belongs_to({FACTS!r}, resume=False)"
    with _other_process(tmp_path, begin), pytest.raises(ConfigError, match="of another request; .*: options;"):
        RunStore(tmp_path).belongs_to({**FACTS, "options": "x"}, resume=False)

    RunStore(tmp_path).belongs_to({**FACTS, "options": "x"}, resume=False)


def test_a_point_that_is_done_or_failed_is_not_claimed_again(tmp_path):
    store = RunStore(tmp_path)
    for name in ("done", "failed"):
        assert store.claim(name)
    store.settle("done", EVIDENCE)
    store.settle("failed", None, failure="no such op")

    assert not store.claim("done")
    assert not store.claim("failed")
    assert store.failures() == {"failed": "no such op"}


@contextlib.contextmanager
def _other_process(folder, does):
    """Have another process do something with the record, and stay alive until the block ends."""
    code = f"import sys; from pathlib import Path; from rdeploy.run_store import RunStore; print({does}, flush=True); input()"
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() in (b"True\n", b"None\n")
        yield
        other.kill()


def test_a_claim_holds_while_its_process_lives_and_lapses_with_it(tmp_path):
    with _other_process(tmp_path, "RunStore(Path(sys.argv[1])).claim('p')"):
        assert not RunStore(tmp_path).claim("p")
        assert RunStore(tmp_path).elsewhere() == {"p"}

    assert RunStore(tmp_path).elsewhere() == frozenset()
    assert RunStore(tmp_path).claim("p")


def test_a_claim_is_not_that_of_a_later_process_of_the_same_number(tmp_path):
    store = RunStore(tmp_path)
    with store._open() as database:
        started = psutil.Process(1).create_time() - 3600
        database.execute("INSERT INTO points (id, owner, born, started) VALUES ('p', 1, ?, 0)", (started,))

    assert store.elsewhere() == frozenset()
    assert store.claim("p")


def test_what_was_claimed_and_not_measured_is_given_back(tmp_path):
    store = RunStore(tmp_path)
    store.claim("p")

    store.release()

    assert store.evidence() == ()
    assert store.claim("p")


def _claims(folder, names, answers, told):
    store = RunStore(Path(folder))
    answers.put([name for name in names if store.claim(name)])
    told.wait(60)  # a claim lapses with its process


def test_of_two_processes_each_point_goes_to_one(tmp_path):
    RunStore(tmp_path)
    context = multiprocessing.get_context("spawn")
    names, answers, told = [f"p{index}" for index in range(40)], context.Queue(), context.Event()
    workers = [context.Process(target=_claims, args=(str(tmp_path), names, answers, told)) for _ in range(2)]
    for worker in workers:
        worker.start()

    found = [answers.get(timeout=60) for _ in workers]

    told.set()
    for worker in workers:
        worker.join(60)
    assert sorted(found[0] + found[1]) == sorted(names)


def test_while_one_process_measures_another_waits(tmp_path):
    lock = fcntl.LOCK_EX | fcntl.LOCK_NB
    with RunStore(tmp_path).measuring(), (tmp_path / "run.lock").open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, lock)

    with (tmp_path / "run.lock").open() as file:
        fcntl.flock(file, lock)


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "run.sqlite").write_bytes(os.urandom(4096))

    with pytest.raises(ConfigError, match=r"cannot be used as the record of a run .*choose another --out"):
        RunStore(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"run.sqlite: cannot be used as the record of a run"):
        RunStore(tmp_path)


def test_a_point_that_nobody_claimed_can_be_settled(tmp_path):
    store = RunStore(tmp_path)

    store.settle(EVIDENCE.point.id, EVIDENCE)

    assert store.evidence() == (EVIDENCE,)
    assert not store.claim(EVIDENCE.point.id)
