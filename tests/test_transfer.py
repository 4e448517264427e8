"""Entries of a store between machines: what is packed arrives, once each content, and nothing damaged or outside gets in."""

import hashlib

import pytest

from rdeploy import transfer
from rdeploy.errors import InvariantError
from rdeploy.store import Store
from rdeploy.transfer import Parcel, RecordingStore


def entry(store, key, **files):
    def write(folder):
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    return store.make("export", key, write)


def test_a_parcel_holds_each_content_once_and_becomes_the_same_entries(tmp_path):
    here, there = Store(tmp_path / "a"), Store(tmp_path / "b")
    entry(here, "k1", graph=b"same", facts=b"1")
    entry(here, "k2", graph=b"same")

    parcel = transfer.pack(here, [("export", "k1"), ("export", "k2"), ("export", "missing")])
    arrived = transfer.unpack(parcel, there)

    assert parcel.size_bytes == len(b"same") + len(b"1")
    assert arrived == (("export", "k1"), ("export", "k2"))
    assert (there.root / "export/k1/graph").read_bytes() == b"same"
    assert (there.root / "export/k1/facts").read_bytes() == b"1"
    assert transfer.unpack(parcel, there) == ()


def test_what_arrives_changed_or_points_outside_is_refused_and_leaves_no_entry(tmp_path):
    store, digest = Store(tmp_path), hashlib.sha256(b"x").hexdigest()

    with pytest.raises(InvariantError, match="export/k: graph arrived changed; run the command again"):
        transfer.unpack(Parcel({("export", "k"): (("graph", digest),)}, {digest: b"y"}), store)
    with pytest.raises(InvariantError, match=r"export/k: ../graph lies outside of its entry"):
        transfer.unpack(Parcel({("export", "k"): (("../graph", digest),)}, {digest: b"x"}), store)

    assert store.get("export", "k") is None


def test_a_recording_store_remembers_what_was_used_and_made(tmp_path):
    entry(Store(tmp_path), "old", graph=b"1")
    store = RecordingStore(tmp_path)

    entry(store, "old", graph=b"1")
    entry(store, "new", graph=b"2")
    store.get("export", "missing")

    assert store.used == {("export", "old"), ("export", "new")}


def test_the_entry_of_a_path_is_found_only_inside_of_the_store(tmp_path):
    store = Store(tmp_path / "a")

    assert transfer.name_of(tmp_path / "a/export/k/model.onnx", store) == ("export", "k")
    assert transfer.name_of("/elsewhere/export/k/model.onnx", store) is None
