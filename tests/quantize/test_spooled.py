"""Arrays that are read again as they were written, from memory or from a file."""

import numpy as np
import pytest

from rdeploy.quantize import spooled

ROWS = [[np.full((2, 3), i, np.float32), np.array([i], np.uint8)] for i in range(5)]


@pytest.mark.parametrize("in_memory", [1 << 20, 16])
def test_what_was_written_is_read_again_any_number_of_times(in_memory, monkeypatch):
    monkeypatch.setattr(spooled, "IN_MEMORY_BYTES", in_memory)

    kept = spooled.Spooled(iter(ROWS))

    assert len(kept) == 5
    for _ in range(2):
        for row, expected in zip(kept, ROWS):
            assert [a.dtype for a in row] == [np.float32, np.uint8]
            assert all(np.array_equal(a, b) for a, b in zip(row, expected))


def test_one_place_of_every_row_is_read():
    kept = spooled.Spooled(iter(ROWS))

    assert np.array_equal(kept.column(0), np.stack([row[0] for row in ROWS]))
    assert kept.column(1).tolist() == [[0], [1], [2], [3], [4]]
    assert len(list(kept)) == 5


@pytest.mark.parametrize("in_memory", [1 << 20, 16])
def test_a_row_is_read_by_its_number_in_any_order(in_memory, monkeypatch):
    monkeypatch.setattr(spooled, "IN_MEMORY_BYTES", in_memory)
    kept = spooled.Spooled(iter(ROWS))

    assert [kept[i][1].item() for i in (4, 0, 2)] == [4, 0, 2]
    assert np.array_equal(kept[3][0], ROWS[3][0])
