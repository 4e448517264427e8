"""What `rdeploy optimize` shows while it works and when it is done."""

import io
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from rdeploy.cli import console, duration, optimize
from rdeploy.standing import Standing

POINTS = runpy.run_path(str(Path(__file__).parents[1] / "points.py"))
evidence = POINTS["evidence"]
NATIVE, SMALL, WORSE = evidence(224, 0, 8), evidence(160, 1, 4), evidence(192, 2, 9)
STANDING = Standing(measured=(NATIVE, SMALL, WORSE), left=12, best=SMALL, seconds_left=200.0)


def shown(table):
    out = io.StringIO()
    Console(file=out, width=120).print(table)
    return out.getvalue()


def terminal(monkeypatch, *, is_one):
    """Make stderr a terminal, or a pipe, whose content can be read."""
    out = io.StringIO()
    monkeypatch.setattr(console, "_console", lambda stderr: Console(file=out, force_terminal=is_one, width=140))
    return out


def test_the_live_has_the_front_so_far_the_best_of_it_and_what_is_left():
    text = shown(optimize._live(STANDING))

    assert "3 points measured, at most 12 left, 3 min · best so far: r160-fp32@openvino" in text
    assert "r224-fp32@openvino" in text
    assert "r192-fp32@openvino" not in text
    assert [line for line in text.splitlines() if line.startswith("r160")][0].rstrip().endswith("best so far")


def test_before_anything_is_within_the_budget_that_is_said():
    text = shown(optimize._live(replace(STANDING, best=None, seconds_left=None)))

    assert "3 points measured, at most 12 left · none within the budget so far" in text


def test_on_a_terminal_the_table_is_drawn_above_what_is_going_on(monkeypatch):
    out = terminal(monkeypatch, is_one=True)

    with console.live("searching", verbose=False) as (show, draw):
        draw(optimize._live(STANDING))
        show("build photos[/x] r168")

    assert "best so far: r160-fp32@openvino" in out.getvalue()
    assert "build photos[/x] r168" in out.getvalue()


def test_piped_a_search_is_quiet(monkeypatch):
    out = terminal(monkeypatch, is_one=False)

    with console.live("searching", verbose=False) as (show, draw):
        show("build r168")

    assert draw is None
    assert out.getvalue() == ""


def test_a_latency_from_a_machine_that_was_not_fit_has_a_star_and_the_reason_below(capsys):
    doubtful = replace(SMALL, unfit=("other processes took 20 % of the CPUs",))
    choice = SimpleNamespace(pick=doubtful, second=NATIVE, reason="lowest latency")
    result = SimpleNamespace(notes=(), variants=())
    told = {"ruled_out": (("int8", "it needs images"),), "failures": (), "unfinished": ()}

    optimize._print(SimpleNamespace(choice=choice, measured=(doubtful, NATIVE), result=result, **told))

    out, err = capsys.readouterr()
    assert "4.00*" in out
    assert "8.00*" not in out
    assert "* the machine was not fit to measure on: other processes took 20 % of the CPUs" in err
    assert "int8 was ruled out: it needs images" in err


@pytest.mark.parametrize(("seconds", "text"), [(40.4, "40 s"), (200, "3 min"), (5400, "1.5 h")])
def test_durations_are_said_as_people_say_them(seconds, text):
    assert duration.text(seconds) == text
