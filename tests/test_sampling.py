"""Sampling what cannot be enumerated: seeded, resumed from the run's folder, and every choice a variant with its own name."""

import builtins

import pytest

from rdeploy import sampling
from rdeploy.errors import ConfigError, MissingDependency
from rdeploy.sampling import Dimension, Sampler
from rdeploy.search_request import search_request
from rdeploy.types import Variant

SPACE = (Dimension("place", ("a", "b")), *(Dimension(f"float-{i}", (0, 1)) for i in range(6)))


def value_of(choices):
    """Latency grows with every group in float; the drop falls, most of all with the first one."""
    floats = [choices[f"float-{i}"] for i in range(6)]
    return 10.0 * (2 if choices["place"] == "a" else 1) + sum(floats), 5.0 - 3 * floats[0] - 0.1 * sum(floats)


def run(folder, seed, count):
    sampler = Sampler(folder, SPACE, seed=seed)
    asked = []
    for _ in range(count):
        ((number, choices),) = sampler.ask(1)
        sampler.tell(number, value_of(choices))
        asked.append(tuple(choices.values()))
    return asked


def test_the_same_seed_draws_the_same_and_another_one_does_not(tmp_path):
    pytest.importorskip("optuna", reason="no Optuna here: pip install 'rdeploy[scale]'")
    for name in "abc":
        (tmp_path / name).mkdir()

    assert run(tmp_path / "a", 0, 12) == run(tmp_path / "b", 0, 12) != run(tmp_path / "c", 1, 12)


def test_a_sampler_goes_on_where_the_folder_says_and_counts_failures(tmp_path):
    pytest.importorskip("optuna", reason="no Optuna here: pip install 'rdeploy[scale]'")
    first = run(tmp_path, 0, 5)

    sampler = Sampler(tmp_path, SPACE, seed=0)
    ((number, choices),) = sampler.ask(1)
    sampler.tell(number, None)

    assert sampler.told == 6
    assert tuple(choices.values()) != first[0]


def test_where_there_is_something_else_to_choose_from_the_draw_begins_anew(tmp_path):
    pytest.importorskip("optuna", reason="no Optuna here: pip install 'rdeploy[scale]'")
    run(tmp_path, 0, 3)

    other = Sampler(tmp_path, (Dimension("place", ("b", "c")), *SPACE[1:]), seed=0)

    assert other.told == 0
    assert {choices["place"] for _, choices in other.ask(8)} <= {"b", "c"}
    assert Sampler(tmp_path, SPACE, seed=0).told == 3


def test_after_the_first_draws_the_better_place_is_drawn_more_often(tmp_path):
    pytest.importorskip("optuna", reason="no Optuna here: pip install 'rdeploy[scale]'")
    asked = run(tmp_path, 0, 26)[10:]

    assert sum(choices[0] == "b" for choices in asked) > 10


def test_a_few_weights_are_stretched_over_all_blocks():
    assert sampling.spread((1, 3), 4) == [1, 1, 3, 3]
    assert sampling.spread((0, 1, 2, 4), 6) == [0, 0, 1, 2, 2, 4]


def test_without_optuna_the_command_that_installs_it_is_said_before_any_work(monkeypatch):
    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest, **more: _refuse(name, original, *rest, **more))

    with pytest.raises(MissingDependency, match=r"--samples needs Optuna.*pip install 'rdeploy\[scale\]'"):
        sampling.require(3)
    sampling.require(0)


def _refuse(name, original, *rest, **more):
    if name == "optuna":
        raise ImportError(name)
    return original(name, *rest, **more)


@pytest.mark.parametrize("at", ["input", ["input", "stem@0.5"]])
def test_samples_of_what_can_all_be_enumerated_are_refused_before_the_search(at, tmp_path):
    with pytest.raises(ConfigError, match="samples: there is nothing to sample.*with --int8.*with --at tokens"):
        search_request("timm:resnet18", {"samples": 3, "out": str(tmp_path), "fp32": True, "at": at})

    assert (
        search_request(
            "timm:x", {"samples": 3, "out": str(tmp_path), "fp32": True, "at": "input@0.9+tokens@0.8"}
        ).samples
        == 3
    )


@pytest.mark.parametrize("samples", [-1, 200_000, True])
def test_samples_out_of_range_are_refused(samples, tmp_path):
    with pytest.raises(ConfigError, match="samples .* is out of range: it must be a whole number from 0 to 100000"):
        search_request("timm:resnet18", {"samples": samples, "out": str(tmp_path), "fp32": True})


def test_a_sample_is_part_of_the_variants_name():
    assert Variant(resolution=(168, 168), precision="int8", sample="s3f2a").id == "r168-s3f2a-int8"
    assert Variant(resolution=(168, 168), precision="int8").id == "r168-int8"
