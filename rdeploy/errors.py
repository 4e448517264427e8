"""The error tree: every failure a user can see is one of these, and says what happened, where, and how to fix it.

RdeployError
├── ConfigError            the request is wrong: an option, a file, a configuration            exit 2
├── MissingDependency      something is not installed here; carries the exact pip command      exit 3
├── Unsupported            the model, op or target cannot do what was asked                    exit 2
├── StageError             a stage of the pipeline failed on one variant                       exit 1
└── InvariantError         a check between two stages did not hold: a bug, or a damaged file   exit 1
"""

from __future__ import annotations


class RdeployError(Exception):
    """Base of all errors that rdeploy raises on purpose; `str()` is one line for the user."""

    exit_code = 1


class ConfigError(RdeployError):
    """What the user asked for is wrong: an option, a path, a file's content, a configuration key."""

    exit_code = 2


class MissingDependency(RdeployError):
    """A package, driver or device that this step needs is not on this machine."""

    exit_code = 3

    def __init__(self, what: str, *, install: str = "") -> None:
        self.what, self.install = what, install
        super().__init__(f"{what}; install it with: {install}" if install else what)


class Unsupported(RdeployError):
    """The request is well-formed, but this model, op, resolution or target cannot do it; `stage` is where that was found."""

    exit_code = 2

    def __init__(self, message: str, *, stage: str = "resize") -> None:
        self.stage = stage
        super().__init__(message)


class StageError(RdeployError):
    """One stage failed on one variant; the other variants go on."""

    exit_code = 1

    def __init__(self, stage: str, message: str) -> None:
        self.stage = stage
        super().__init__(f"{stage}: {message}")


class InvariantError(RdeployError):
    """A check that is always on between two stages did not hold."""

    exit_code = 1
