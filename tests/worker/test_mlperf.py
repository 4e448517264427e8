"""What rdeploy does around MLPerf's load generator, with and without it."""

import pytest

from rdeploy.errors import ConfigError, MissingDependency, StageError
from rdeploy.worker import mlperf

HOW = {"seconds": 1.0, "rate": 10.0}


def test_other_scenarios_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="unknown MLPerf scenario 'Server'; there are: SingleStream, Offline"):
        mlperf.run_scenario(print, "Server", folder=tmp_path, batch=1, **HOW)


def test_single_stream_is_batch_one(tmp_path):
    with pytest.raises(ConfigError, match="one sample at a time; measure it at batch 1, not 4"):
        mlperf.run_scenario(print, "SingleStream", folder=tmp_path, batch=4, **HOW)


def test_without_the_load_generator_the_command_is_said(tmp_path, monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(mlperf.importlib, "import_module", absent)

    with pytest.raises(
        MissingDependency, match=r"not installed here; install it with: pip install 'rdeploy\[mlperf\]'"
    ):
        mlperf.run_scenario(print, "Offline", folder=tmp_path, batch=1, **HOW)


SUMMARY = """================================================
MLPerf Results Summary
================================================
SUT name : PySUT
Scenario : SingleStream
Mode     : PerformanceOnly
90.0th percentile latency (ns) : 2500000
Result is : INVALID
  Min duration satisfied : NO
"""


def test_the_summary_is_read_as_it_is_written(tmp_path):
    (tmp_path / "mlperf_log_summary.txt").write_text(SUMMARY)

    found = mlperf.read_summary(tmp_path, "SingleStream")

    assert (found.value, found.valid, found.folder) == (2.5, False, str(tmp_path))
    assert dict(found.summary)["Min duration satisfied"] == "NO"


@pytest.mark.parametrize("text", [None, "nothing", "Samples per second: 9\n"])
def test_no_result_is_a_failure_that_names_the_file(tmp_path, text):
    if text is not None:
        (tmp_path / "mlperf_log_summary.txt").write_text(text)

    with pytest.raises(StageError, match=r"wrote no result into .*mlperf_log_summary.txt"):
        mlperf.read_summary(tmp_path, "Offline")
