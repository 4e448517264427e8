"""Memory that is free goes back, with any C library."""

import ctypes
import gc

import pytest

from rdeploy.quantize import heap


@pytest.fixture(autouse=True)
def _forgotten():
    heap._trim.cache_clear()
    yield
    heap._trim.cache_clear()


def test_the_c_library_is_asked_for_what_is_free(monkeypatch):
    asked = []

    class Library:
        malloc_trim = staticmethod(asked.append)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())

    heap.release(0)

    assert asked == [0]


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())

    heap.release(0)


@pytest.mark.parametrize(("size", "times"), [(heap.LARGE_BYTES, 0), (heap.LARGE_BYTES + 1, 1)])
def test_graphs_are_collected_where_they_are_large(size, times, monkeypatch):
    seen = []
    monkeypatch.setattr(gc, "collect", lambda: seen.append(1))

    heap.release(size)

    assert len(seen) == times
