import errno
import os
import socket
import subprocess
import sys
import time

import pytest

from rdeploy import store
from rdeploy.errors import ConfigError
from rdeploy.store import Store, atomic_folder


def dead_pid():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_an_entry_is_made_once(tmp_path):
    cache, calls = Store(tmp_path), []

    def write(folder):
        calls.append(folder)
        (folder / "x").write_text("made")

    first, second = cache.make("kind", "key", write), cache.make("kind", "key", write)

    assert first == second == tmp_path / "kind" / "key"
    assert (first / "x").read_text() == "made"
    assert len(calls) == 1


def test_a_failing_writer_leaves_no_entry(tmp_path):
    def write(folder):
        (folder / "x").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Store(tmp_path).make("kind", "key", write)

    assert Store(tmp_path).get("kind", "key") is None
    assert list((tmp_path / "kind").iterdir()) == []


def test_the_folder_is_not_visible_before_it_is_complete(tmp_path):
    final = tmp_path / "bundle"
    with atomic_folder(final) as folder:
        (folder / "x").write_text("x")
        assert not final.exists()

    assert (final / "x").read_text() == "x"


def test_an_existing_folder_stays_unless_it_is_to_be_replaced(tmp_path):
    final = tmp_path / "bundle"
    for replace, content in ((False, "first"), (False, "second"), (True, "third")):
        with atomic_folder(final, replace=replace) as folder:
            (folder / "x").write_text(content)
        assert (final / "x").read_text() == {"second": "first"}.get(content, content)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_replacing_works_where_the_system_cannot_swap(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_exchange", lambda first, second: False)
    final = tmp_path / "bundle"
    for content in ("old", "new"):
        with atomic_folder(final, replace=True) as folder:
            (folder / "x").write_text(content)

    assert (final / "x").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_swap_cut_in_two_is_put_back(tmp_path):
    (tmp_path / ".replaced-bundle").mkdir()

    store.remove_leftovers(tmp_path)

    assert (tmp_path / "bundle").is_dir()


def test_leftovers_of_dead_processes_are_removed_and_those_of_living_ones_kept(tmp_path):
    host = socket.gethostname()
    dead = tmp_path / f".partial-{host}-{dead_pid()}-abc"
    living = tmp_path / f".partial-{host}-{os.getppid()}-abc"
    elsewhere = tmp_path / ".partial-otherhost-1-abc"
    for folder in (dead, living, elsewhere):
        folder.mkdir()

    store.remove_leftovers(tmp_path)

    assert not dead.exists()
    assert living.exists()
    assert elsewhere.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_disk_is_one_sentence(tmp_path, number):
    said = r"cannot write .*bundle: .*; free some space or choose another folder"
    with pytest.raises(ConfigError, match=said), atomic_folder(tmp_path / "bundle"):
        raise OSError(number, os.strerror(number))

    assert list(tmp_path.iterdir()) == []


def test_other_errors_pass_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "bundle"):
        (tmp_path / "missing").read_text()


def test_prune_removes_what_was_used_longest_ago(tmp_path):
    cache = Store(tmp_path)
    for age, key in enumerate(("new", "middle", "old")):
        entry = cache.make("kind", key, lambda folder: (folder / "x").write_bytes(b"0" * 1000))
        then = time.time() - 1000 * age
        os.utime(entry, (then, then))

    assert cache.prune(2500) == 1
    assert sorted(path.name for path in (tmp_path / "kind").iterdir()) == ["middle", "new"]


def test_using_an_entry_makes_it_young(tmp_path):
    cache = Store(tmp_path)
    entry = cache.make("kind", "key", lambda folder: None)
    os.utime(entry, (1, 1))

    cache.get("kind", "key")

    assert entry.stat().st_mtime > time.time() - 60


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("RDEPLOY_CACHE", str(tmp_path))

    assert store.default_root() == tmp_path


def test_a_short_write_of_numpys_is_a_full_disk(tmp_path):
    said = "cannot write .*bundle: no space left; free some space"
    with pytest.raises(ConfigError, match=said), atomic_folder(tmp_path / "bundle"):
        raise OSError("4064256 requested and 3145600 written")
