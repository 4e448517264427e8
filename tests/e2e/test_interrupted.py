"""Killed at any point, the next run completes, and nobody ever sees half a bundle."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from rdeploy import bundle

from .conftest import BUILD, BUNDLE, Workplace


def appeared(pattern: str):
    """Return a condition: something in the workplace matches the pattern."""

    def there(place: Workplace) -> bool:
        try:
            return any(place.folder.glob(pattern))
        except FileNotFoundError:  # a folder went while it was looked through
            return False

    return there


POINTS = {
    "exporting": appeared("cache/export/.partial-*"),
    "quantizing": appeared("cache/quantize/.partial-*/*.onnx"),
    "building": appeared("cache/jobs/*/job.json"),
    "measuring": appeared("cache/jobs/*/session-0*"),
    "bundling": appeared("out/.partial-*"),
}


def visible(place: Workplace) -> list[Path]:
    """Return the bundles that can be seen; what is kept beside them for the report is none."""
    out = place.folder / "out"
    found = out.iterdir() if out.is_dir() else ()
    return [path for path in found if not path.name.startswith(".") and path.name != "disagreements"]


def children_of(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if f"PPid:\t{pid}\n" in status.read_text():
                found.append(int(status.parent.name))
        except OSError:
            continue
    return found


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks for orphans in Linux's /proc")
@pytest.mark.parametrize("point", POINTS)
def test_a_build_killed_at_any_point_leaves_nothing_half_and_completes_next_time(point, trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    place = Workplace(tmp_path)
    child = place.start(*BUILD)
    deadline = time.monotonic() + 120
    while not POINTS[point](place) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    caught = child.poll() is None
    started = children_of(child.pid)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()

    time.sleep(0.5)
    assert caught or point == "bundling", f"the build was over before it was {point}"
    assert not [pid for pid in started if alive(pid)]
    for folder in visible(place):
        bundle.read(folder)

    again = place.run(*BUILD)

    assert again.returncode == 0, again.stderr
    assert [path.name for path in visible(place)] == [BUNDLE]
    bundle.read(tmp_path / "out" / BUNDLE)
    assert not list((tmp_path / "out").glob(".partial-*"))


def test_a_killed_rebuild_leaves_the_old_bundle_whole(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    place = Workplace(tmp_path)
    assert place.run(*BUILD).returncode == 0
    before = (tmp_path / "out" / BUNDLE / "manifest.json").read_text()
    changed = [*BUILD[: BUILD.index("120")], "60", *BUILD[BUILD.index("120") + 1 :]]

    child = place.start(*changed)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cache" / "quantize").glob(".partial-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()

    assert (tmp_path / "out" / BUNDLE / "manifest.json").read_text() == before
    bundle.read(tmp_path / "out" / BUNDLE)


def test_an_interrupt_ends_with_130_and_one_line(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    place = Workplace(tmp_path)
    child = place.start(*BUILD)
    while not list((tmp_path / "cache" / "export").glob("*")) and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)

    assert child.returncode == 130
    assert "Traceback" not in err
    assert visible(place) == []
