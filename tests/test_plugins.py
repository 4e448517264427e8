from dataclasses import dataclass

import pytest

from rdeploy import plugins
from rdeploy.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Options:
    count: int = 1
    share: float = 0.5
    names: tuple[str, ...] = ()
    path: str | None = None


def test_a_plugin_is_found_by_its_file_name():
    assert plugins.find("rdeploy.quantize.calibrators", "mse").__name__ == "rdeploy.quantize.calibrators.mse"


def test_private_modules_are_no_plugins():
    assert not [name for name in plugins.names("rdeploy.backends") if name.startswith("_")]


def test_an_unknown_plugin_lists_what_there_is_and_the_closest_name():
    with pytest.raises(ConfigError, match=r"unknown calibrator 'percentil', did you mean 'percentile'\?; there are: "):
        plugins.find("rdeploy.quantize.calibrators", "percentil")


def test_options_are_taken_strictly():
    assert plugins.make_options(Options, {"count": 2, "share": 1, "names": ("a",)}, where="x") == Options(
        count=2, share=1, names=("a",)
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cuont": 2}, r"here: unknown key 'cuont', did you mean 'count'\? \(allowed: count, names, path, share\)"),
        ({"count": "2"}, r"here: count must be int, not '2'"),
        ({"count": True}, r"here: count must be int, not True"),
        ({"share": "much"}, r"here: share must be float, not 'much'"),
        ({"names": (1,)}, r"here: names must be tuple\[str, ...\], not \(1,\)"),
        ({"path": 3}, r"here: path must be str \| None, not 3"),
    ],
)
def test_wrong_options_are_refused_with_the_place(values, message):
    with pytest.raises(ConfigError, match=message):
        plugins.make_options(Options, values, where="here")
