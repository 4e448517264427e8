"""Where a job is done: two processes may be at the same one."""

import os
import subprocess
import sys

from rdeploy.steps import engine


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
