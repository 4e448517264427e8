"""The options of a search: what is searched when nothing is said, and what cannot be asked for."""

import pytest

from rdeploy.errors import ConfigError
from rdeploy.search_request import PLACES, search_request


def test_without_a_word_everything_is_searched(tmp_path):
    (tmp_path / "images").mkdir()

    found = search_request("timm:resnet18", {"calib": str(tmp_path / "images"), "out": str(tmp_path)})

    assert found.build.precisions == ("fp32", "int8")
    assert found.build.at == PLACES
    assert found.ladder
    assert found.left_out == ()
    assert found.budget.objective == "latency"
    assert found.budget.max_drop is None


def test_int8_is_not_searched_without_images_and_that_is_said(tmp_path):
    found = search_request("timm:resnet18", {"out": str(tmp_path)})

    assert found.build.precisions == ("fp32",)
    assert dict(found.left_out)["int8"].startswith("it needs images to find its ranges")
    assert search_request("timm:resnet18", {"out": str(tmp_path), "fp32": True}).left_out == ()


def test_a_size_that_is_named_is_the_only_one(tmp_path):
    assert not search_request("timm:resnet18", {"out": str(tmp_path), "scale": 1.0}).ladder
    assert not search_request("timm:resnet18", {"out": str(tmp_path), "at": "stem@0.75"}).ladder
    assert search_request("timm:resnet18", {"out": str(tmp_path), "at": "stem"}).ladder


def test_the_budget_and_the_command_are_kept(tmp_path):
    found = search_request(
        "m.onnx", {"max_drop": 0, "max_latency_ms": 4.5, "time_budget": 60, "resume": True, "out": str(tmp_path)}
    )

    assert (found.budget.max_drop, found.budget.max_latency_ms, found.time_budget_s, found.resume) == (0, 4.5, 60, True)
    assert found.build.command.startswith("rdeploy optimize m.onnx --max-drop 0 --max-latency-ms 4.5")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop": -1}, "max-drop -1 is out of range: it must be 0 or more"),
        ({"max_drop": "1%"}, "max-drop '1%' is not a number"),
        ({"time_budget": "20m"}, "time-budget '20m' is not a number of seconds, such as 1200"),
        ({"scale": "half"}, "scale 'half' is not a number"),
        ({"mean": ("a", "b")}, "mean 'a' is not a number"),
        ({"crop_pct": [1]}, "crop-pct [1] is not a number"),
        ({"resolution": 0.75}, "resolution 0.75 is not a size; write N or HxW"),
        ({"max_latency_ms": 0}, "max-latency-ms 0 is out of range: it must be above 0"),
        ({"max_memory_mb": float("nan")}, "max-memory-mb nan is out of range"),
        ({"objective": "latncy"}, "unknown objective 'latncy', did you mean 'latency'"),
        ({"bugdet": 1}, "unknown option 'bugdet'"),
    ],
)
def test_what_cannot_be_is_refused(options, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        search_request("timm:resnet18", {**options, "out": str(tmp_path)})

    assert message in str(caught.value)


def test_a_search_adapts_nothing_unless_told(tmp_path):
    assert search_request("timm:x", {"out": str(tmp_path)}).build.adapt == "none"
    assert search_request("timm:x", {"out": str(tmp_path), "adapt": "auto"}).build.adapt == "auto"


def test_a_search_that_would_train_every_point_is_refused(tmp_path):
    given = {"out": str(tmp_path), "finetune": str(tmp_path)}

    with pytest.raises(
        ConfigError, match="finetune in a search trains every point of it: name the few with --at and --scale"
    ):
        search_request("timm:x", {**given, "scale": 0.5})
    named = search_request("timm:x", {**given, "scale": 0.5, "at": "input"})

    assert named.build.finetune.data == str(tmp_path)
