"""What the documentation says can be typed: every command of it is parsed by the real command line; links and pages exist."""

import contextlib
import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from rdeploy.backends import tensorrt, tensorrt_rtx
from rdeploy.cli import State, cli
from rdeploy.request import BuildOptions

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]
FENCE = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def commands():
    for page in PAGES:
        for block in FENCE.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                text = line.strip().removeprefix("$ ")
                if text.startswith("rdeploy "):
                    yield pytest.param(text, id=f"{page.name}: {text[:70]}")


@pytest.mark.parametrize("text", list(commands()))
def test_every_command_of_the_documentation_is_one_that_the_command_line_takes(text):
    words = shlex.split(text, comments=True)[1:]
    words = words[: next((i for i, word in enumerate(words) if word in ("|", ">", "&&", ";")), len(words))]
    group = cli.make_context("rdeploy", words, obj=State(command=text))
    verb = cli.get_command(group, words[0])
    assert verb is not None, f"no such verb: {words[0]}"

    with contextlib.suppress(click.exceptions.Exit):  # --help and --version end the parsing themselves
        verb.make_context(words[0], words[1:], parent=group)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(page):
    targets = [link.partition("#")[0] for link in LINK.findall(page.read_text()) if "://" not in link]
    missing = [target for target in targets if target and not (page.parent / target).exists()]

    assert missing == []


def test_every_option_of_tensorrt_is_documented_and_no_other():
    page = (ROOT / "docs" / "tensorrt.md").read_text()
    both, _, alone = page.partition("Of TensorRT alone:")

    def documented(text):
        cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
        return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}

    shared = {field.name for field in dataclasses.fields(tensorrt_rtx.Options)}
    assert documented(both) == shared
    assert documented(alone) == {field.name for field in dataclasses.fields(tensorrt.Options)} - shared


def test_every_message_of_the_troubleshooting_page_is_one_that_rdeploy_says():
    source = "".join(path.read_text() for path in (ROOT / "rdeploy").rglob("*.py"))
    said = re.sub(r'"\s*\n\s*f?"', "", source)  # literals that a line break joins
    headings = re.findall(r"^## (.+)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)

    assert len(headings) > 8
    assert [heading for heading in headings if heading not in said] == []


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="builds the site: pip install 'rdeploy[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "index.html").is_file()
    reference = (tmp_path / "site" / "python" / "index.html").read_text()
    assert all(
        f"<code>{option}</code>" in reference for option in ("time_budget", "max_latency_ms", "samples", "workers")
    )
    assert all(f'id="rdeploy.request.BuildOptions.{option}"' in reference for option in BuildOptions.__annotations__)
    assert all(
        f'id="rdeploy.{name}"' in reference for name in ("choosing.Choice", "search.Evidence", "results.BuildResult")
    )
