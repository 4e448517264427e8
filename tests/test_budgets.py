"""The YAML of budgets is read strictly; every refusal says what is wrong and what was meant."""

import pytest

from rdeploy import budgets
from rdeploy.errors import ConfigError


@pytest.fixture
def load(tmp_path):
    def read(text):
        path = tmp_path / "budgets.yaml"
        path.write_text(text)
        return budgets.load(path)

    return read


def test_without_a_file_there_are_defaults():
    rules = budgets.load(None)

    assert rules.of("latency", "onnxruntime") == 0.05
    assert rules.of("macs", None) == 0.0
    assert rules.of("throughput", "onnxruntime") is None
    assert rules.alpha == pytest.approx(0.01)


def test_a_backend_has_the_common_budgets_and_its_own(load):
    rules = load(
        "confidence: 0.95\nbudgets: {latency: 3, memory: null, accuracy: 0.5}\nbackends:\n  openvino: {latency: 10}\n"
    )

    assert rules.alpha == pytest.approx(0.05)
    assert rules.of("latency", "onnxruntime") == pytest.approx(0.03)
    assert rules.of("latency", "openvino") == pytest.approx(0.10)
    assert rules.of("memory", "openvino") is None
    assert rules.of("accuracy", "openvino") == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "budget: {latency: 5}",
            "unknown key 'budget', did you mean 'budgets'? (allowed: backends, budgets, confidence)",
        ),
        ("budgets: {latncy: 5}", "budgets: unknown key 'latncy', did you mean 'latency'? (allowed: "),
        ("budgets: {latency: 5 %}", "budgets: latency must be float | None, not '5 %'"),
        ("budgets: {latency: -1}", "budgets: latency must be percent, 0 or more, or null, not -1"),
        ("budgets: {accuracy: 100}", "budgets: accuracy must be points, 0 to below 100, or null, not 100"),
        ("budgets: [latency]", "budgets: expected a mapping of names to values, found list"),
        ("backends: {openvin: {latency: 5}}", "unknown backend 'openvin', did you mean 'openvino'?; there are: "),
        ("confidence: 99", "confidence must be a number from 0.5 to below 1, not 99"),
        ("budgets: {latency: 1, latency: 2}", "not valid YAML: key 'latency' comes twice"),
    ],
)
def test_what_no_budget_can_be_is_refused(load, text, message):
    with pytest.raises(ConfigError) as caught:
        load(text)

    assert message in str(caught.value)


def test_a_file_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the budgets .*none.yaml: No such file or directory"):
        budgets.load(tmp_path / "none.yaml")
