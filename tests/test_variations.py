"""Choices become variants: groups of layers in float, schedules within the budget; what can be enumerated is refused."""

from types import SimpleNamespace

import pytest

from rdeploy import variations
from rdeploy.errors import Unsupported
from rdeploy.types import QuantOptions, Variant

PLACE = Variant(resolution=(24, 24))
QUANT = QuantOptions(recipe="fast")


@pytest.fixture
def this(monkeypatch):
    layers = [f"conv{index}" for index in range(10)]
    monkeypatch.setattr(
        variations,
        "_groups",
        lambda this, place: tuple(tuple(layers[i * 10 // 8 : (i + 1) * 10 // 8]) for i in range(8)),
    )
    return SimpleNamespace(request=SimpleNamespace(precisions=("fp32", "int8")))


def choices(*floats):
    return {"place": "r24-fp32", **{f"float-{i}": int(i in floats) for i in range(8)}}


def test_without_int8_and_tokens_there_is_nothing_to_sample(this):
    with pytest.raises(Unsupported, match="nothing to sample: without --int8 and without --at tokens"):
        variations.space_of(this, [PLACE], None)


def test_layers_are_chosen_in_groups_along_the_network(this):
    space = variations.space_of(this, [PLACE], QUANT)

    made = variations.variant_of(this, space, choices(0, 3))

    assert [dimension.name for dimension in space.dimensions] == ["place", *(f"float-{i}" for i in range(8))]
    assert made.quant is not None
    assert made.quant.keep_float == ("conv0", "conv3", "conv4")
    assert made.precision == "int8"
    assert made.resolution == (24, 24)


def test_equal_choices_have_equal_names_and_others_do_not(this):
    space = variations.space_of(this, [PLACE], QUANT)

    first, again, other = (variations.variant_of(this, space, choices(*floats)) for floats in ((0,), (0,), (1,)))

    assert first == again
    assert first.id != other.id


def test_no_group_in_float_is_the_variant_that_was_enumerated(this):
    space = variations.space_of(this, [PLACE], QUANT)

    assert variations.variant_of(this, space, choices()).id == "r24-int8"


def test_all_layers_in_float_is_no_int8(this):
    space = variations.space_of(this, [PLACE], QUANT)

    with pytest.raises(Unsupported, match="all layers in float: that is the FP32 variant"):
        variations.variant_of(this, space, choices(*range(8)))
