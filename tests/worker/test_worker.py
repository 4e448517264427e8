"""One job in one child: results come back, and no crash, hang or noise gets out."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rdeploy import worker
from rdeploy.errors import ConfigError
from rdeploy.worker import JobFailed

ROOT = Path(__file__).resolve().parents[2]


def call(job, tmp_path, timeout_s=60.0):
    return worker.call(job, directory=tmp_path / "job", timeout_s=timeout_s)


def test_the_engine_job_builds_runs_and_judges(tmp_path, fake, engine_job):
    job = engine_job(fake(), verify={}, outputs=tmp_path / "reference.npy", options=(("level", 3),))

    result = call(job, tmp_path)

    assert result["engine"]["path"] == "engine.fake"
    assert result["engine"]["notes"] == ["level 3"]
    assert result["verification"] == {
        "passed": True,
        "reasons": [],
        "executed_by": "fake 1.0",
        "parity": None,
        "accuracy": None,
        "agreement": None,
    }
    assert result["not_run"] is None
    assert np.load(tmp_path / "reference.npy").shape == (11, 5)


def test_outputs_are_compared_with_the_reference_labels_and_native_model(tmp_path, fake, engine_job):
    call(engine_job(fake(), verify={}, outputs=tmp_path / "reference.npy"), tmp_path)
    reference = np.load(tmp_path / "reference.npy")
    labels = reference.argmax(axis=1).tolist()
    verify = {"reference": tmp_path / "reference.npy", "native": tmp_path / "reference.npy", "labels": labels}

    result = call(engine_job(fake("shifted.fake", shift=0.25), verify=verify), tmp_path)

    parity = result["verification"]["parity"]
    noise = 0.25**2 * reference.size
    assert parity["max_abs_err"] == pytest.approx(0.25, abs=1e-6)
    assert parity["sqnr_db"] == pytest.approx(10 * np.log10(np.sum(reference.astype(float) ** 2) / noise), abs=1e-4)
    assert result["verification"]["accuracy"]["value"] == 1.0
    assert result["verification"]["accuracy"]["samples"] == 11
    assert result["verification"]["agreement"]["value"] == 1.0


def test_a_collapsed_engine_is_a_result_not_an_error(tmp_path, fake, engine_job):
    call(engine_job(fake(), verify={}, outputs=tmp_path / "reference.npy"), tmp_path)

    verify = {"reference": tmp_path / "reference.npy"}
    result = call(engine_job(fake("dead.fake", scale=0.0), verify=verify), tmp_path)

    assert result["verification"]["passed"] is False
    assert result["verification"]["reasons"][0] == "the output is the same for all 11 images"


@pytest.mark.parametrize("batch", [-1, 1, 4, 16])
def test_every_batch_size_gives_one_row_an_image(tmp_path, fake, engine_job, batch):
    job = engine_job(fake(batch=batch), verify={"batch": 3}, outputs=tmp_path / "outputs.npy")

    call(job, tmp_path)

    pixels = np.load(tmp_path / "pixels.npy").astype(float) / 255
    expected = pixels.mean(axis=(1, 2))[:, np.arange(5) % 3] * np.arange(1, 6)
    np.testing.assert_allclose(np.load(tmp_path / "outputs.npy"), expected, rtol=1e-5)
    assert not list(tmp_path.glob("*.partial"))


def test_an_engine_for_other_hardware_is_built_and_not_run(tmp_path, fake, engine_job, monkeypatch):
    monkeypatch.setenv("FAKE_BUILT_FOR", "moon")

    result = call(engine_job(fake(run="abort"), verify={}), tmp_path)

    assert result["not_run"] == "built for the moon"
    assert result["verification"] is None


def test_an_engine_that_is_there_can_be_verified_again(tmp_path, fake, engine_job):
    job = engine_job(fake(), verify={})
    call(job, tmp_path)

    again = {"job": "verify", "backend": "fake", "path": tmp_path / "engines/engine.fake", "verify": job["verify"]}
    result = call(again, tmp_path)

    assert result["verification"]["passed"] is True


def test_an_error_in_the_child_is_one_sentence_with_its_kind(tmp_path, fake, engine_job):
    with pytest.raises(JobFailed) as caught:
        call(engine_job(fake(build="refuse")), tmp_path)

    assert str(caught.value) == "build: the fake does not know this op; leave it out"
    assert (caught.value.stage, caught.value.error) == ("build", "Unsupported")
    assert caught.value.reproduce == f"rdeploy worker {tmp_path / 'job' / 'job.json'}"


def test_an_unexpected_exception_names_itself_and_leaves_its_traceback_in_the_log(tmp_path, fake, engine_job):
    with pytest.raises(JobFailed) as caught:
        call(engine_job(fake(run="raise"), verify={}), tmp_path)

    assert str(caught.value) == "verify: RuntimeError: vendor trouble"
    assert "Traceback" in (tmp_path / "job/worker.log").read_text()


@pytest.mark.parametrize(("how", "stage"), [({"build": "abort"}, "build"), ({"run": "abort"}, "verify")])
def test_a_crash_names_the_signal_the_stage_and_the_log(tmp_path, fake, engine_job, how, stage):
    with pytest.raises(JobFailed) as caught:
        call(engine_job(fake(**how), verify={}), tmp_path)

    assert str(caught.value) == f"{stage}: crashed with SIGABRT; log: {tmp_path / 'job/worker.log'}"
    assert caught.value.error == "crash"
    assert caught.value.log == ("vendor: assertion failed",)


def test_a_hang_is_ended_with_everything_that_it_started(tmp_path, fake, engine_job, gone):
    job = engine_job(fake(build="hang", pid_file=tmp_path / "pids"))

    with pytest.raises(
        JobFailed, match=r"build: did not finish within 2 s and was stopped; log: .*worker.log"
    ) as caught:
        call(job, tmp_path, timeout_s=2.0)

    assert caught.value.error == "hang"
    assert gone(tmp_path / "pids")


@pytest.mark.parametrize("how", ["garbage", "exit"])
def test_a_child_without_a_readable_result_is_a_crash(tmp_path, fake, engine_job, how):
    job = engine_job(fake(build=how, result=tmp_path / "job/result.json"))

    with pytest.raises(JobFailed, match="build: ended without a readable result; log: "):
        call(job, tmp_path)


def test_an_old_result_is_not_taken_for_a_new_one(tmp_path, fake, engine_job):
    call(engine_job(fake()), tmp_path)

    with pytest.raises(JobFailed, match="SIGABRT"):
        call(engine_job(fake(build="abort")), tmp_path)


def test_a_library_that_crashes_while_python_ends_does_not_spoil_the_result(tmp_path, fake, engine_job):
    result = call(engine_job(fake(build="abort at exit")), tmp_path)

    assert result["engine"]["backend"] == "fake"


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_no_child_outlives_the_process_that_started_it(tmp_path, fake, engine_job, gone, end):
    job = json.dumps(engine_job(fake(build="hang", pid_file=tmp_path / "pids")), default=str)
    code = "import json, pathlib, sys; from rdeploy import worker\n"
    code += "worker.call(json.loads(sys.argv[1]), directory=pathlib.Path(sys.argv[2]), timeout_s=500)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ["PYTHONPATH"]))}
    parent = subprocess.Popen(
        [sys.executable, "-c", code, job, str(tmp_path / "job")], env=environment, stderr=subprocess.DEVNULL
    )
    wait_for_two_processes(tmp_path / "pids")

    parent.send_signal(end)
    parent.wait()

    worker_pid = tmp_path / "worker-pid"
    worker_pid.write_text((tmp_path / "pids").read_text().split()[0])
    stop_the_rest(tmp_path / "pids")
    assert gone(worker_pid)


def wait_for_two_processes(pid_file):
    for _ in range(2000):
        if pid_file.is_file() and len(pid_file.read_text().split()) == 2:
            return
        time.sleep(0.01)
    raise AssertionError("the child never started")


def stop_the_rest(pid_file):
    """End the `sleep` that the fake started: after a SIGKILL nobody is left to do it."""
    try:
        os.kill(int(pid_file.read_text().split()[1]), signal.SIGKILL)
    except ProcessLookupError:
        return


def test_the_job_file_runs_again_from_another_folder(tmp_path, fake, engine_job, monkeypatch):
    model = fake()
    monkeypatch.chdir(tmp_path)
    first = call(engine_job(model.name, verify={}), tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ["PYTHONPATH"]))}

    command = [sys.executable, "-m", "rdeploy.worker", str(tmp_path / "job/job.json")]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "job/result.json").read_text())["ok"] == first


def test_run_job_refuses_what_it_does_not_know(tmp_path):
    with pytest.raises(ConfigError, match="unknown job 'bake'; there are: engine, verify, measure, session"):
        worker.run_job({"job": "bake"}, directory=tmp_path)
    with pytest.raises(ConfigError, match="job engine: unknown key 'colour'"):
        worker.run_job({"job": "engine", "colour": 1}, directory=tmp_path)
    with pytest.raises(ConfigError, match="job verify: .*missing .* 'backend'"):
        worker.run_job({"job": "verify"}, directory=tmp_path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot read the job"),
        ("{", "is not a job file: Expecting property name"),
        ("[1]", "is not a job file: expected a mapping, found list"),
        ('{"job": "bake"}', "unknown job 'bake'"),
    ],
)
def test_main_says_in_one_line_what_is_wrong_with_a_job_file(tmp_path, capsys, text, sentence):
    path = tmp_path / "job.json"
    if text is not None:
        path.write_text(text)

    code = worker.main([str(path)])

    captured = capsys.readouterr()
    assert code == 2
    assert sentence in captured.err
    assert captured.err.count("\n") == 1


def test_pickled_arrays_are_never_loaded(tmp_path, fake, engine_job):
    path = tmp_path / "evil.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)

    with pytest.raises(JobFailed, match=r"verify: cannot read the images from .*evil.npy: .*Python objects"):
        call(engine_job(fake(), verify={"pixels": path}), tmp_path)


def test_missing_and_misshaped_images_are_one_sentence(tmp_path, fake, engine_job):
    np.save(tmp_path / "flat.npy", np.zeros((4, 4), np.uint8))
    np.savez(tmp_path / "many.npz", a=np.zeros(1))

    with pytest.raises(JobFailed, match=r"verify: cannot read the images from .*none.npy: .*No such file"):
        call(engine_job(fake(), verify={"pixels": tmp_path / "none.npy"}), tmp_path)
    with pytest.raises(JobFailed, match=r"must be \(N, H, W, C\) with N at least 1, not \(4, 4\)"):
        call(engine_job(fake(), verify={"pixels": tmp_path / "flat.npy"}), tmp_path)
    with pytest.raises(JobFailed, match=r"give a .npy file with one array"):
        call(engine_job(fake(), verify={"pixels": tmp_path / "many.npz"}), tmp_path)


def test_wrong_backend_options_are_refused_with_their_place(tmp_path, fake, engine_job):
    with pytest.raises(JobFailed, match="target bench, backend fake: unknown key 'levle', did you mean 'level'"):
        call(engine_job(fake(), options=(("levle", 1),)), tmp_path)


def test_the_device_side_loads_no_heavy_package():
    modules = ["worker", "worker.engine", "worker.session", "worker.interleave", "verify", "measure", "memory"]
    code = "import sys\n" + "".join(f"import rdeploy.{name}\n" for name in modules)
    code += "print(sorted({'torch', 'onnx', 'scipy', 'PIL', 'click', 'rich'} & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_asking_for_the_worker_loads_no_numpy():
    code = "import sys, rdeploy.worker; print('numpy' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "False"
