"""The CI files that users copy: valid YAML, and every `rdeploy` command in them names verbs and options that there are."""

import importlib
import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from rdeploy import budgets, cli

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "docs" / "ci").glob("*.yml"))
GUIDE = ROOT / "docs" / "ci-gate.md"

pytestmark = pytest.mark.skipif(not FILES, reason="the tests are not run from a source tree")


def strings(value):
    """Yield every string in a YAML document."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def commands(text):
    """Yield the words of every `rdeploy` command in a shell script, its lines joined."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|\||;|\)|\(", line):
            words = shlex.split(part, comments=True)
            words = words[1:] if words and "=" in words[0] else words
            if words[:1] == ["rdeploy"] and len(words) > 1:
                yield words[1:]


def check(words):
    """Fail unless the words are a verb (and its own verb) with options that it has."""
    assert words[0] in cli.VERBS, words
    command = importlib.import_module(f"rdeploy.cli.{words[0]}").command
    if isinstance(command, click.Group):
        assert words[1] in command.commands, words
        command = command.commands[words[1]]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, words


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_a_ci_file_is_valid_and_names_real_options(file):
    found = [words for text in strings(yaml.safe_load(file.read_text())) for words in commands(text)]

    assert {words[0] for words in found} >= {"build", "check"}
    for words in found:
        check(words)


def test_the_gitlab_job_lets_an_inconclusive_check_pass():
    job = yaml.safe_load((ROOT / "docs" / "ci" / "gitlab-ci.yml").read_text())["rdeploy"]

    assert job["allow_failure"] == {"exit_codes": [4]}
    assert job["artifacts"]["reports"]["junit"] == "junit.xml"


def test_the_workflow_has_what_github_requires():
    workflow = yaml.safe_load((ROOT / "docs" / "ci" / "github-actions.yml").read_text())

    # YAML 1.1 reads the key `on` as True.
    assert workflow[True] == "pull_request"
    steps = workflow["jobs"]["check"]["steps"]
    assert all(("uses" in step) != ("run" in step) for step in steps)


def test_the_guide_names_real_options_and_the_default_budgets(tmp_path):
    text = GUIDE.read_text()
    for line in re.findall(r"`(rdeploy [^`]+)`|^    (rdeploy .+)$", text, re.MULTILINE):
        for words in commands("".join(line)):
            check(words)
    (tmp_path / "budgets.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL).group(1))

    rules = budgets.load(tmp_path / "budgets.yaml")

    assert rules.budgets == budgets.Budgets()
    assert rules.confidence == budgets.Rules().confidence
    assert rules.of("latency", "openvino") == pytest.approx(0.1)


def test_the_projects_own_gate_can_be_read_and_passes_against_itself():
    from rdeploy import baseline, regress, verdicts

    folder = ROOT / "benchmarks" / "baselines"
    rules, found = budgets.load(folder / "demo.yaml"), baseline.read(folder / "demo.json")

    assert found.counts["macs"] > 1e8
    assert rules.of("nodes", None) == 0.0
    assert verdicts.overall(regress.compare(found, found, rules)) == "pass"
