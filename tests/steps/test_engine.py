"""Where a job is done, and when it was done before."""

import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace

from rdeploy import serde
from rdeploy.steps import engine
from rdeploy.store import Store
from rdeploy.worker.jobs import Entry, Measured, MeasureJob


def test_a_job_has_a_folder_of_its_own_in_every_process(tmp_path):
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    mine, others, dead = (tmp_path / f"key-{pid}" for pid in (os.getpid(), os.getppid(), int(gone.stdout)))
    another_job = tmp_path / f"other-{int(gone.stdout)}"
    for folder in (mine, others, dead, another_job):
        folder.mkdir()

    assert engine._own_folder(tmp_path, "key") == mine
    assert sorted(tmp_path.iterdir()) == sorted([others, another_job])


def test_the_same_engines_are_measured_again_at_another_batch_size(tmp_path, monkeypatch):
    asked = []

    def measure(job, *, directory, timeout_s):
        asked.append(job["entries"][0]["batch"])
        directory.mkdir(parents=True)
        answer = {"ok": {"entries": [serde.to_json(Measured(name="0/ort", measurement=None))]}}
        (directory / engine.worker.RESULT_FILE).write_text(serde.dumps(answer))

    steps = SimpleNamespace(store=Store(tmp_path), run_measuring=measure, stage=lambda *_: contextlib.nullcontext())
    for batch in (1, 8, 8, 1):
        job = MeasureJob(entries=(Entry(name="0/ort", backend="onnxruntime", path="engine", batch=batch),))
        engine.measured(steps, job, ["0/ort/abc"])

    assert asked == [1, 8]
