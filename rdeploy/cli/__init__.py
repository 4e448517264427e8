"""The command line: arguments go in, one verb runs, an exit code comes out. Loads a verb's module only to run it.

0 done · 1 a variant failed, or a regression · 2 the request is wrong · 3 something is missing here · 4 inconclusive
130 interrupted
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click

from rdeploy import __version__, plugins
from rdeploy.errors import RdeployError

VERBS = {
    "build": "Build reduced-resolution and INT8 variants of a model, measured beside the original.",
    "optimize": "Search resolutions, precisions and runtimes for the best point under a budget.",
    "profile": "Measure latency, throughput and memory of a bundle or an ONNX file.",
    "evaluate": "Score a bundle on labelled images or masks, and its agreement with another bundle.",
    "check": "The CI gate: compare with a baseline: pass, regression, improvement or inconclusive.",
    "history": "Keep what was measured over time; show trends and where they changed.",
    "report": "Write one self-contained HTML page of a run, or its Markdown, CSV and plots.",
    "run": "Predict: the most probable classes of each image, an overlay, or a vector.",
    "inspect": "Show layers, MACs, parameters, activation bytes and the precision of each layer.",
    "package": "Write a bundle into a Triton model repository.",
    "targets": "List the target profiles, or show one.",
    "doctor": "Check every backend: PASS, or the reason and the exact fix.",
    "schema": "Print the JSON Schema of a file that rdeploy writes.",
    "worker": "Run one job file in this process (the reproduce command of a failure).",
}

_EXTRAS = {
    "torch": "torch", "onnx": "torch", "onnx_ir": "torch", "onnxscript": "torch", "safetensors": "torch",
    "timm": "zoo", "torchvision": "zoo", "transformers": "hf", "onnxruntime": "cpu", "openvino": "cpu",
}  # fmt: skip
_INTERRUPTED = 130


SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@dataclass
class State:
    """What the verbs and the error handling share: the command as typed, the verb, whether to show tracebacks."""

    command: str
    verb: str = ""
    debug: bool = False


class Verbs(click.Group):
    """A group whose verbs are imported when they are called; its help needs none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"rdeploy.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            hint = plugins.did_you_mean(args[0], VERBS)
            raise click.UsageError(f"no such verb {args[0]!r}{hint}; there are: {', '.join(VERBS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.Abort from None  # click itself would print an empty line first
        except EOFError as error:
            # click takes it for Ctrl-D at a prompt; here it is a file that ends too early.
            raise RuntimeError(f"unexpected end of a file ({error})") from error


@click.group(cls=Verbs, invoke_without_command=True, context_settings=SETTINGS)
@click.option("--debug", is_flag=True, help="Show tracebacks and the libraries' own output.")
@click.version_option(__version__, prog_name="rdeploy")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Deploy trained vision models: lower input resolution, INT8, engines for the target, all of it measured.

    Start with: rdeploy build timm:resnet18 --scale 0.75 --int8 --calib PHOTOS/
    """
    state: State = ctx.obj
    state.debug = debug
    state.verb = ctx.invoked_subcommand or ""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    try:
        code = execute(sys.argv[1:])
    except KeyboardInterrupt:  # it came while another one, or an error, was being answered
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        _leave(code)
    sys.exit(code)


def _leave(code: int) -> NoReturn:
    """Exit with a code after an interrupt. Where it came while Python ran a string (as it does to make a dataclass), Python
    would end itself by the same signal after `sys.exit` (`python -m`), and the code would be lost."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def execute(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; whatever went wrong is one line on stderr."""
    state = State(command=shlex.join(["rdeploy", *arguments]))
    try:
        code = cli.main(args=list(arguments), prog_name="rdeploy", standalone_mode=False, obj=state)
        return code if isinstance(code, int) else 0
    except (click.Abort, KeyboardInterrupt):
        return _say("rdeploy: interrupted", _INTERRUPTED)
    except click.ClickException as error:
        place = getattr(getattr(error, "ctx", None), "command_path", "rdeploy")
        return _say(f"{place}: {error.format_message()}", 2)
    except RdeployError as error:
        return _fail(state, str(error), error.exit_code)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            return _fail(state, _unexpected(error), 1)
        return _fail(
            state, f"{package} is not installed; install it with: pip install 'rdeploy[{_EXTRAS[package]}]'", 3
        )
    except Exception as error:  # noqa: BLE001 - the last boundary: a user sees one line, --debug shows the rest
        return _fail(state, _unexpected(error), 1)


def _fail(state: State, message: str, code: int) -> int:
    if state.debug:
        traceback.print_exc()
    return _say(f"rdeploy {state.verb}: {message}" if state.verb else f"rdeploy: {message}", code)


def _say(message: str, code: int) -> int:
    click.echo(" ".join(message.split()), err=True)
    return code


def _unexpected(error: Exception) -> str:
    """Say where rdeploy's own code was when something happened that it does not know."""
    root = Path(__file__).parent.parent
    frames = traceback.extract_tb(error.__traceback__)
    mine = [frame for frame in frames if Path(frame.filename).is_relative_to(root)] or frames
    place = f"{Path(mine[-1].filename).relative_to(root.parent)}:{mine[-1].lineno}" if mine else "unknown place"
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"unexpected error in {place}: {reason}; run it again with --debug for the traceback, and please report it"
