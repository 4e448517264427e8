"""What the scripts that run in the peers' environments share: images read from an .npy file one at a time, and the answer.

Needs NumPy alone. Images are read, not mapped: mapped pages would count as the tool's memory.
"""

import json
import time
from pathlib import Path

import numpy as np
from peak import peak_bytes


class Rows:
    """The images (1, C, H, W) of an .npy file (N, C, H, W), each read when it is asked for."""

    def __init__(self, path):
        self.path = path
        with Path(path).open("rb") as file:
            np.lib.format.read_magic(file)
            self.shape, _, self.dtype = np.lib.format.read_array_header_1_0(file)
            self.offset = file.tell()
        self.size = int(np.prod(self.shape[1:]))

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = self.offset + int(index) * self.size * self.dtype.itemsize
        return np.fromfile(self.path, self.dtype, self.size, offset=start).reshape(1, *self.shape[1:])


def features(output):
    """Return what images are judged by: logits (N, ...), or the mean patch feature of tokens (N, tokens, C)."""
    return output[:, 1:].mean(axis=1) if output.ndim == 3 else output


class Clock:
    """Times a tool and prints what `compare.py` reads: version, seconds, and the peak memory of this process."""

    def __init__(self):
        self.start = time.perf_counter()

    def answer(self, version, **more):
        seconds = time.perf_counter() - self.start
        print(json.dumps({"version": version, "seconds": seconds, "peak_bytes": peak_bytes(), **more}))
