"""`rdeploy check` and `rdeploy history` as a user runs them: verdicts, exit codes, files, and one real measurement."""

import importlib.util
import json
import sqlite3
from xml.etree import ElementTree

import pytest

import rdeploy
from rdeploy import baseline, cli, gate, launches
from rdeploy.errors import ConfigError
from rdeploy.launches import Outcome
from rdeploy.snapshot import EngineFacts, Launch, Snapshot
from rdeploy.types import Timing

needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnx") is None, reason="the bundle is made with onnx")


@pytest.fixture
def file(tmp_path):
    """Write a baseline file with so many MACs and an engine of so many bytes; return its path."""

    def write(name, macs=100, size=1000, **facts):
        engine = EngineFacts(backend="onnxruntime", size_bytes=size, **facts)
        baseline.write(tmp_path / name, Snapshot(name="net r6", counts={"macs": macs}, engines=(engine,)))
        return str(tmp_path / name)

    return write


def check(*words):
    return cli.execute(["check", *words])


def test_equal_counts_pass(file, capsys):
    assert check(file("a.json"), "--baseline", file("b.json")) == 0

    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "pass: net r6 against net r6 (2 pass)"
    assert err == ""


def test_more_macs_are_a_regression_with_exit_code_1(file, capsys):
    assert check(file("a.json", macs=110), "--baseline", file("b.json")) == 1

    out, err = capsys.readouterr()
    assert "regression" in out
    assert "+10.00 %" in out
    assert f"if that is intended, make it the baseline with: rdeploy check {file('a.json')} --write-baseline" in out
    assert err == "rdeploy check: regression: net r6 against net r6 (1 regression, 1 pass)\n"


def test_fewer_macs_ask_for_the_baseline_to_be_updated(file, capsys):
    current, base = file("a.json", macs=90), file("b.json")

    assert check(current, "--baseline", base) == 0

    assert f"it got better; make it the baseline with: rdeploy check {current} --write-baseline {base}" in (
        capsys.readouterr().out
    )


def test_the_command_that_updates_the_baseline_does(file):
    current, base = file("a.json", macs=90), file("b.json")

    assert check(current, "--write-baseline", base) == 0
    assert check(current, "--baseline", base) == 0
    assert baseline.read(base).counts["macs"] == 90


def test_what_cannot_be_told_is_exit_code_4(file, capsys):
    one = (Launch(blocks_ms=((1.0,) * 8,)),)
    current = file("a.json", launches=one)

    assert check(current, "--baseline", file("b.json", launches=one)) == 4
    assert "inconclusive: net r6 against net r6 (1 inconclusive, 2 pass)" in capsys.readouterr().err


def test_json_is_all_that_is_on_stdout(file, capsys, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")

    assert check(file("a.json", macs=110), "--baseline", file("b.json"), "--json") == 1

    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["verdict"], found["exit_code"]) == ("regression", 1)
    assert found["findings"][0]["interval"] == pytest.approx([0.1, 0.1])
    assert "::error title=rdeploy check%3A regression::macs: 100 MMACs".replace("100 MMACs", "0.0001 MMACs") in err


def test_the_files_that_ci_reads_are_written(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    (tmp_path / "summary.md").write_text("before\n")
    files = ("--markdown", str(tmp_path / "c.md"), "--junit", str(tmp_path / "j.xml"))

    assert check(file("a.json", macs=110), "--baseline", file("b.json"), *files) == 1

    assert "::error title=" in capsys.readouterr().out
    assert (tmp_path / "c.md").read_text().startswith("### rdeploy check: ❌ regression")
    assert (tmp_path / "summary.md").read_text() == "before\n" + (tmp_path / "c.md").read_text()
    assert ElementTree.parse(tmp_path / "j.xml").getroot().get("failures") == "1"


def test_budgets_come_from_the_file(file, tmp_path):
    (tmp_path / "budgets.yaml").write_text("budgets: {macs: 20}")

    words = (file("a.json", macs=110), "--baseline", file("b.json"), "--budgets", str(tmp_path / "budgets.yaml"))

    assert check(*words) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give --baseline FILE, or --write-baseline FILE"),
        (("--baseline", "b", "--write-baseline", "c"), "--baseline compares, --write-baseline writes: give one"),
        (("--baseline", "b", "--rerun-baseline", "--measure"), "--rerun-baseline measures CURRENT too"),
        (("--baseline", "b", "--rerun-baseline", "--native", "n"), "--rerun-baseline compares the two directly"),
        (("--baseline", "b", "--native", "n"), "--native measures: it needs --measure"),
        (("--baseline", "b", "--until-decided"), "--until-decided measures: it needs --rerun-baseline or --measure"),
        (("--baseline", "b", "--measure", "--launches", "1"), "--launches must be 2 or more"),
        (("--baseline", "b", "--time-budget", "soon"), "'soon' is not a duration; write it as 90s, 2m or 1h"),
        (("--baseline", "b"), "cannot read a: No such file or directory"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(words, message, capsys):
    assert check("a", *words) == 2

    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_what_measures_needs_bundles(file, capsys):
    assert check(file("a.json"), "--baseline", file("b.json"), "--rerun-baseline") == 2
    assert "--rerun-baseline measures, so the current side must be a bundle with its engines" in capsys.readouterr().err


def test_engines_that_are_not_there_are_named(file, capsys):
    assert check(file("a.json"), "--baseline", file("b.json"), "--backend", "openvino") == 2
    assert "has no openvino; its engines: onnxruntime" in capsys.readouterr().err


def fake_measure(*steps):
    """Return a stand-in for `launches.measure` whose current side takes so much longer in each call."""
    calls = []

    def measure(sides, count, **how):
        factors = steps[min(len(calls), len(steps) - 1)]
        calls.append(count)
        one = {
            side: tuple(
                Launch(blocks_ms=((factors[i % len(factors)] if side == "current" else 1.0,),), process_peak_bytes=10)
                for i in range(count)
            )
            for side in sides
        }
        return Outcome(launches=one, failures={}, load=0.1)

    measure.calls = calls
    return measure


@needs_onnx
def test_more_launches_are_measured_until_it_is_decided(tiny_bundle, monkeypatch, capsys):
    measure = fake_measure((0.9, 1.1), (1.001, 0.999))
    monkeypatch.setattr(launches, "measure", measure)

    words = ("--baseline", str(tiny_bundle), "--rerun-baseline", "--until-decided", "--json")
    assert check(str(tiny_bundle), *words) == 0

    found = json.loads(capsys.readouterr().out)
    assert measure.calls[:3] == [6, 3, 4]
    assert found["launches"] == {"onnxruntime": sum(measure.calls)}
    assert {one["verdict"] for one in found["findings"]} == {"pass"}


@needs_onnx
def test_the_time_budget_ends_what_cannot_be_decided(tiny_bundle, monkeypatch, capsys):
    measure = fake_measure((0.5, 1.5))
    monkeypatch.setattr(launches, "measure", measure)

    words = ("--baseline", str(tiny_bundle), "--rerun-baseline", "--until-decided", "--time-budget", "0.000001s")
    assert check(str(tiny_bundle), *words) == 4

    assert measure.calls == [6]
    assert "more launches would settle it" in capsys.readouterr().out


@needs_onnx
def test_an_engine_that_crashes_when_it_is_measured_is_a_regression(tiny_bundle, monkeypatch, capsys):
    broken = Outcome(launches={"current": (), "baseline": ()}, failures={"current": "crashed with SIGSEGV"})
    monkeypatch.setattr(launches, "measure", lambda *a, **k: broken)

    assert check(str(tiny_bundle), "--baseline", str(tiny_bundle), "--rerun-baseline", "--json") == 1

    found = {one["metric"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    assert found["engine"]["reason"] == "it could not be measured: crashed with SIGSEGV"


@needs_onnx
def test_a_real_engine_is_measured_beside_itself_and_beside_its_baseline_file(
    tiny_bundle, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(launches.measure, "__kwdefaults__", {**launches.measure.__kwdefaults__, "timing": QUICK})
    base = tmp_path / "base.json"
    (tmp_path / "budgets.yaml").write_text("budgets: {build_time: 1000}")
    words = ("--rerun-baseline", "--launches", "2", "--budgets", str(tmp_path / "budgets.yaml"), "--json")

    code = check(str(tiny_bundle), "--baseline", str(tiny_bundle), *words)
    found = json.loads(capsys.readouterr().out)
    wrote = check(str(tiny_bundle), "--write-baseline", str(base), "--native", str(tiny_bundle), "--launches", "2")

    assert code in (0, 4)
    assert found["launches"] == {"onnxruntime": 2}
    latency = next(one for one in found["findings"] if one["metric"] == "latency")
    assert latency["basis"] == "2 launches side by side"
    assert latency["interval"][0] <= latency["change"] <= latency["interval"][1]
    built = next(one for one in found["findings"] if one["metric"] == "build_time")
    assert (built["basis"], built["current"] > 0) == ("2 launches side by side", True)
    assert wrote == 0
    engine = baseline.read(base).engines[0]
    assert (len(engine.launches), len(engine.native)) == (2, 2)
    assert all(launch.process_peak_bytes > 1e6 for launch in engine.launches)
    assert baseline.read(base).machine["host"] == baseline.here()["host"]


QUICK = Timing(min_samples=32, max_samples=48, min_time_s=0.0, max_time_s=5.0, max_warmup_s=0.05)


@needs_onnx
def test_labelled_images_are_compared_one_by_one(tiny_bundle, tmp_path):
    np = pytest.importorskip("numpy")
    images = np.zeros((6, 8, 8, 3), np.uint8)
    for index in range(6):
        images[index, ..., index % 3] = 255
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(6) % 3)

    found = rdeploy.check(tiny_bundle, tiny_bundle, data=tmp_path / "data.npz")

    accuracy = next(one for one in found.findings if one.metric == "accuracy")
    assert accuracy.basis == "6 images, one by one: 0 decided differently"
    assert (accuracy.current, accuracy.change) == (1.0, 0.0)


def test_a_baseline_without_scores_cannot_be_compared_image_by_image(file, tmp_path):
    with pytest.raises(ConfigError, match="scores no image by itself; write it again with --write-baseline and --data"):
        gate.check(file("a.json"), file("b.json"), data=tmp_path)


def test_history_is_kept_by_check_and_shown(file, tmp_path, capsys):
    database = str(tmp_path / "h.sqlite")

    for macs in (100, 100, 100, 100, 130, 130, 130, 130):
        check(file("a.json", macs=macs), "--baseline", file("b.json"), "--history", database)
    assert cli.execute(["history", "add", file("a.json", macs=130), "--label", "c9", "--file", database]) == 0
    capsys.readouterr()
    assert cli.execute(["history", "list", "--file", database, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert cli.execute(["history", "trend", "macs", "--file", database]) == 0

    shown = capsys.readouterr().out
    assert [run["verdict"] for run in listed] == ["pass"] * 4 + ["regression"] * 4 + [""]
    assert listed[-1]["label"] == "c9"
    assert shown.startswith("net r6: macs 130, 9 entries\n  ▁▁▁▁█████\n")
    assert "changed at entry 5 " in shown
    assert "100 -> 130, +30.0 %" in shown
    with sqlite3.connect(database) as connection:
        assert connection.execute("select count(*) from runs").fetchone() == (9,)


def test_help_of_the_verbs_says_what_the_codes_mean(capsys):
    assert cli.execute(["check", "--help"]) == 0
    assert "4 inconclusive" in " ".join(capsys.readouterr().out.split())
    assert cli.execute(["history", "--help"]) == 0
