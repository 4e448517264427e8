"""Child processes that cannot outlive the one that started them, and what they leave behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

_PACKAGES = Path(__file__).resolve().parents[2]
_STAGE = "rdeploy stage: "
_TAIL_BYTES = 8192
_PR_SET_PDEATHSIG = 1


def start(job: Path, *, log: Path) -> subprocess.Popen[bytes]:
    """Start a child on a job file, in its own process group, with all its output in `log`."""
    with log.open("wb") as file:
        return subprocess.Popen(
            _command(job),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=_environment(),
            start_new_session=True,
        )


def start_with_pipes(job: Path, *, log: Path) -> subprocess.Popen[bytes]:
    """Start a child in its own process group that is spoken to over stdin and stdout; stderr goes to `log`."""
    with log.open("wb") as file:
        return subprocess.Popen(
            _command(job),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            env=_environment(),
            start_new_session=True,
            bufsize=0,
        )


def stop_group(child: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a child's process group and collect the child."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def die_with_parent(parent: int) -> None:
    """Ask the kernel (Linux) to kill this process when its parent ends, and end now if it already has."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def mark_stage(name: str) -> None:
    """Write into the log which stage begins, so that a crash can be blamed on it."""
    sys.stderr.write(f"{_STAGE}{name}\n")
    sys.stderr.flush()


def last_stage(log: Path) -> str | None:
    """Return the stage that a child was in when its log ended."""
    with contextlib.suppress(OSError):
        found = re.findall(rf"^{_STAGE}(\S+)$", log.read_text(errors="replace"), re.MULTILINE)
        return found[-1] if found else None
    return None


def tail(log: Path, lines: int = 5) -> tuple[str, ...]:
    """Return the last non-empty lines of a log, without stage marks."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ()
    kept = [line.rstrip() for line in text.splitlines() if line.strip() and not line.startswith(_STAGE)]
    return tuple(kept[-lines:])


def describe_exit(code: int) -> str:
    """Say how a process ended: the signal's name, or the exit code."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else f"signal {-code}"
    reason = " (the usual reason is too little memory)" if -code == signal.SIGKILL else ""
    return f"crashed with {name}{reason}"


def _command(job: Path) -> list[str]:
    return [sys.executable, "-m", "rdeploy.worker", str(job), "--parent", str(os.getpid())]


def _environment() -> dict[str, str]:
    """Let the child import this very package, and nothing by accident from the folder it is started in."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    if _PACKAGES not in installed:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_PACKAGES), os.environ.get("PYTHONPATH"))))
    return environment
