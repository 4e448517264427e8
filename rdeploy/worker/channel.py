"""The parent's end of a session child: requests out, answers back as lines of JSON, with a limit on the waiting."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any

from rdeploy import serde
from rdeploy.errors import StageError
from rdeploy.worker import process
from rdeploy.worker.jobs import SessionJob

_STAGE = "measure"


class SessionFailed(StageError):
    """A session child reported an error, crashed or hung; `error` is its exception class, "crash" or "hang"."""

    def __init__(self, message: str, *, error: str) -> None:
        self.error = error
        super().__init__(_STAGE, message)


class Channel:
    """One session child; starting it opens no engine yet. `stem` is where its .json and .log go, without suffix."""

    def __init__(self, job: SessionJob, *, stem: Path) -> None:
        self._log = stem.with_name(stem.name + ".log")
        path = stem.with_name(stem.name + ".json")
        path.write_text(serde.dumps(job))
        self._child = process.start_with_pipes(path, log=self._log)
        self._pending = b""

    def ask(self, do: str, *, timeout_s: float, **fields: Any) -> dict[str, Any]:
        """Send one request and return its answer; the calling process sleeps meanwhile.

        Raises:
            SessionFailed: the child reported an error, died, answered nonsense, or not within `timeout_s`.
        """
        try:
            line = self._exchange(json.dumps({"do": do, **fields}).encode() + b"\n", timeout_s)
        except BrokenPipeError:
            line = None
        if line is None:
            raise SessionFailed(f"{process.describe_exit(self._wait())}; log: {self._log}", error="crash")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise SessionFailed(f"the engine's process answered {line[:80]!r}; log: {self._log}", error="crash")
        if "error" in answer:
            raise SessionFailed(answer["message"], error=answer["error"])
        return answer

    def stop(self) -> None:
        """Let the child end by itself for a moment after its pipe was closed, then kill it and what it started."""
        if self._child.stdin is not None:
            self._child.stdin.close()
        self._wait()
        process.stop_group(self._child)
        if self._child.stdout is not None:
            self._child.stdout.close()

    def kill(self) -> None:
        """End the child and what it started, now."""
        process.stop_group(self._child)

    def _exchange(self, request: bytes, timeout_s: float) -> bytes | None:
        """Return the next line, or None where the child closed its end."""
        pipe_in, pipe_out = self._child.stdin, self._child.stdout
        if pipe_in is None or pipe_out is None:
            return None
        pipe_in.write(request)
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._pending:
            ready, _, _ = select.select([pipe_out], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.kill()
                raise SessionFailed(
                    f"did not answer within {timeout_s:g} s and was stopped; log: {self._log}", error="hang"
                )
            received = os.read(pipe_out.fileno(), 1 << 16)
            if not received:
                return None
            self._pending += received
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _wait(self, patience_s: float = 5.0) -> int:
        try:
            return self._child.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.stop_group(self._child)
            return self._child.wait()
