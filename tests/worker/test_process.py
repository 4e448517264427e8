"""How a child's end and its log are told."""

import signal

import pytest

from rdeploy.worker import process


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (3, "ended with exit code 3"),
        (-signal.SIGSEGV, "crashed with SIGSEGV"),
        (-signal.SIGKILL, "crashed with SIGKILL (the usual reason is too little memory)"),
        (-200, "crashed with signal 200"),
    ],
)
def test_describe_exit(code, sentence):
    assert process.describe_exit(code) == sentence


def test_tail_keeps_the_last_lines_that_say_something(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"one\ntwo\n\n  \nrdeploy stage: build\nthree \xff\nfour\nfive\nsix\n")

    assert process.tail(log, 3) == ("four", "five", "six")
    assert process.tail(log, 9) == ("one", "two", "three \N{REPLACEMENT CHARACTER}", "four", "five", "six")
    assert process.tail(tmp_path / "none") == ()


def test_tail_of_a_long_log_reads_its_end_only(tmp_path):
    log = tmp_path / "log"
    log.write_text("x" * 100_000 + "\nlast\n")

    assert process.tail(log)[-1] == "last"


def test_last_stage(tmp_path):
    log = tmp_path / "log"
    log.write_text("rdeploy stage: build\nnoise\nrdeploy stage: verify\nnoise: rdeploy stage: none\n")

    assert process.last_stage(log) == "verify"
    assert process.last_stage(tmp_path / "none") is None
