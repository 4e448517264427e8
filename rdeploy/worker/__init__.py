"""One job, one child process: a plain JSON file goes in, a plain JSON result comes out, a crash or a hang stays inside.

    engine    build an engine from an ONNX file and verify it        -> {engine, verification, not_run}
    verify    verify an engine that is there                         -> {verification}
    measure   time engines against each other, interleaved           -> {entries: [{name, measurement, blocks, ...}]}
    session   the child that holds one engine of a measure job, spoken to over pipes

`call` starts a child and waits; `python -m rdeploy.worker JOB.json` (or `rdeploy worker`) runs the same job again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rdeploy import serde
from rdeploy.errors import ConfigError, RdeployError, StageError
from rdeploy.worker import jobs, process

JOB_FILE, RESULT_FILE, LOG_FILE = "job.json", "result.json", "worker.log"
_KINDS = ("engine", "verify", "measure", "session")


class JobFailed(StageError):
    """A job's child gave up, crashed or hung.

    `error` names what it was (the child's exception class, "crash" or "hang"), `log` holds the last lines of the
    child's log, `reproduce` is the command that runs the job again.
    """

    def __init__(self, stage: str, message: str, *, error: str, log: tuple[str, ...] = (), reproduce: str = "") -> None:
        self.error, self.log, self.reproduce = error, log, reproduce
        super().__init__(stage, message)


def call(job: Mapping[str, Any], *, directory: Path, timeout_s: float) -> dict[str, Any]:
    """Run a job in a child process and return its result; `directory` keeps job.json, result.json and worker.log.

    Paths in the job are made absolute, so that the file can be run again from anywhere. Whatever ends this process
    ends the child too.

    Raises:
        JobFailed: an error in the child, a crash (the signal is named), a hang (killed after `timeout_s`), no result.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path, result, log = (directory / name for name in (JOB_FILE, RESULT_FILE, LOG_FILE))
    path.write_text(serde.dumps(jobs.with_absolute_paths(job)))
    result.unlink(missing_ok=True)
    child = process.start(path, log=log)
    try:
        code = child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        process.stop_group(child)
    return _answer(str(job.get("job")), directory, code=code, timeout_s=timeout_s)


def run_job(job: Mapping[str, Any], *, directory: Path) -> dict[str, Any]:
    """Run a job in this process and return its result as plain JSON values; files that it needs go to `directory`.

    Raises:
        ConfigError: there is no such job, or its fields are wrong.
        RdeployError: what the job itself met.
    """
    kind, where = job.get("job"), f"job {job.get('job')}"
    if kind == "engine":
        from rdeploy.worker.engine import build_and_verify

        return build_and_verify(serde.from_json(jobs.EngineJob, job, where=where))
    if kind == "verify":
        from rdeploy.worker.engine import verify_engine

        return verify_engine(serde.from_json(jobs.VerifyJob, job, where=where))
    if kind == "measure":
        from rdeploy.worker.interleave import measure_interleaved

        found = measure_interleaved(serde.from_json(jobs.MeasureJob, job, where=where), directory=directory)
        return {"entries": serde.to_json(found)}
    if kind == "session":
        from rdeploy.worker.session import serve

        serve(serde.from_json(jobs.SessionJob, job, where=where))
        return {}
    raise ConfigError(f"unknown job {kind!r}; there are: {', '.join(_KINDS)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job of a JSON file here, write result.json beside it, and return the exit code."""
    parser = argparse.ArgumentParser(prog="rdeploy worker", description="Run one job file in this process.")
    parser.add_argument("job", type=Path, metavar="JOB.json")
    parser.add_argument("--parent", type=int, help="end when the process with this id ends")
    options = parser.parse_args(arguments)
    if options.parent is not None:
        process.die_with_parent(options.parent)
    try:
        job = _read_job(options.job)
        done = run_job(job, directory=options.job.parent)
    except KeyboardInterrupt:
        return 130
    except RdeployError as error:
        return _give_up(options.job, error, str(error), error.exit_code)
    except Exception as error:  # noqa: BLE001 - the process boundary: vendors raise anything, and the parent must hear it
        traceback.print_exc()
        text = (str(error).strip() or "no message").splitlines()[0]
        return _give_up(options.job, error, f"{type(error).__name__}: {text}", 1)
    if job["job"] != "session":
        _write_result(options.job, {"ok": done})
    return 0


def reproduce_command(directory: Path) -> str:
    """Return the command that runs the job kept in `directory` again."""
    return f"rdeploy worker {directory / JOB_FILE}"


def _read_job(path: Path) -> dict[str, Any]:
    try:
        job = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the job {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not a job file: {error}") from error
    if not isinstance(job, dict):
        raise ConfigError(f"{path} is not a job file: expected a mapping, found {type(job).__name__}")
    return job


def _give_up(path: Path, error: Exception, message: str, code: int) -> int:
    sys.stderr.write(f"rdeploy worker: {message}\n")
    stage = f"{error.stage}: " if isinstance(error, StageError) else ""
    described = {"error": {"type": type(error).__name__, "message": message.removeprefix(stage)}}
    if path.is_file():
        with contextlib.suppress(OSError):
            _write_result(path, described)
    return code


def _write_result(job_path: Path, result: dict[str, Any]) -> None:
    path = job_path.with_name(RESULT_FILE)
    temporary = path.with_suffix(f".{os.getpid()}.partial")
    temporary.write_text(serde.dumps(result))
    temporary.replace(path)


def _answer(kind: str, directory: Path, *, code: int | None, timeout_s: float) -> dict[str, Any]:
    """Return the result that the child left; it counts even where the vendor's library crashed on the way out."""
    result = _read_result(directory / RESULT_FILE)
    if result is not None and "ok" in result:
        return dict(result["ok"])
    log = directory / LOG_FILE
    if result is not None:
        what, message = result["error"]["type"], result["error"]["message"]
    elif code is None:
        what, message = "hang", f"did not finish within {timeout_s:g} s and was stopped; log: {log}"
    elif code == 0:
        what, message = "crash", f"ended without a readable result; log: {log}"
    else:
        what, message = "crash", f"{process.describe_exit(code)}; log: {log}"
    stage = process.last_stage(log) or {"engine": "build"}.get(kind, kind)
    raise JobFailed(stage, message, error=what, log=process.tail(log), reproduce=reproduce_command(directory))


def _read_result(path: Path) -> dict[str, Any] | None:
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(result, dict):
        return None
    good = isinstance(result.get("ok"), dict)
    told = isinstance(result.get("error"), dict) and {"type", "message"} <= set(result["error"])
    return result if good or told else None
