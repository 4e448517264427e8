"""What a verb shows: data on stdout, progress on stderr, and the libraries' own chatter on neither."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from rdeploy import serde
from rdeploy.adapted import LASTING
from rdeploy.types import EXPECTED

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, for machines.")


def _turn_on(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and ctx.obj is not None:
        ctx.obj.debug = True


debug = click.option(
    "--debug",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_turn_on,
    help="Show tracebacks and the libraries' own output.",
)


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    click.echo(serde.dumps(value), nl=False)


def warn(message: str) -> None:
    """Print one line on stderr."""
    click.echo(" ".join(message.split()), err=True)


def width() -> int:
    """Return how wide stdout is; 100 columns where it is no terminal."""
    from rich.console import Console

    return Console().width if sys.stdout.isatty() or "COLUMNS" in os.environ else 100


def print_table(table: Table) -> None:
    """Print a table on stdout."""
    from rich.console import Console

    Console(width=width(), highlight=False).print(table)


@contextlib.contextmanager
def progress(first: str, *, verbose: bool) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows what is going on; quiet when stderr is no terminal. Keeps stdout for the data.

    What libraries print meanwhile goes to a temporary file that nobody reads, or with `verbose` to stderr.
    """
    with os.fdopen(os.dup(2), "w") as stderr, _libraries_quiet(verbose=verbose):
        console = _console(stderr)
        if not console.is_terminal:
            yield lambda message: _show(console, None, message)
            return
        with console.status(first) as status:
            yield lambda message: _show(console, status.update, message)


def _show(console: Console, update: Callable[[Text], None] | None, message: str) -> None:
    """Show what is going on while it is; what is to be known before the work begins is printed and stays."""
    if message.startswith((EXPECTED, LASTING)):
        console.print(message, highlight=False, soft_wrap=True, markup=False)
    elif update is not None:
        from rich.text import Text

        update(Text(message))  # a path may look like markup


@contextlib.contextmanager
def live(
    first: str, *, verbose: bool
) -> Iterator[tuple[Callable[[str], None], Callable[[RenderableType], None] | None]]:
    """Yield a function that says what is going on and one that shows something above it; quiet when stderr is no terminal."""
    with os.fdopen(os.dup(2), "w") as stderr, _libraries_quiet(verbose=verbose):
        console = _console(stderr)
        if not console.is_terminal:
            yield lambda message: _show(console, None, message), None
            return
        from rich.console import Group
        from rich.live import Live
        from rich.spinner import Spinner
        from rich.text import Text

        spinner = Spinner("dots", text=Text(first))
        shown: list[RenderableType] = []
        with Live(spinner, console=console, transient=True, refresh_per_second=8) as view:

            def draw(above: RenderableType) -> None:
                shown[:] = [above]
                view.update(Group(*shown, spinner))

            yield lambda message: _show(console, lambda text: spinner.update(text=text), message), draw


def _console(stderr: Any) -> Console:
    from rich.console import Console

    return Console(file=stderr, stderr=True)


@contextlib.contextmanager
def _libraries_quiet(*, verbose: bool) -> Iterator[None]:
    """Point stdout and stderr elsewhere: the descriptors, which compiled code writes to, and Python's own files."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as noise, contextlib.ExitStack() as redirected:
        os.dup2(2 if verbose else noise.fileno(), 1)
        if not verbose:
            os.dup2(noise.fileno(), 2)
        try:
            chatter = redirected.enter_context(os.fdopen(os.dup(1), "w", buffering=1))
            redirected.enter_context(contextlib.redirect_stdout(chatter))
            if not verbose:
                redirected.enter_context(contextlib.redirect_stderr(chatter))
            yield
        finally:
            redirected.close()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            os.close(saved[0])
            os.close(saved[1])
