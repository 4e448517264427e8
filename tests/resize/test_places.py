"""How places are written, ordered, composed and told apart."""

import dataclasses

import pytest

from rdeploy import resize, serde
from rdeploy.errors import ConfigError
from rdeploy.resize import Place
from rdeploy.types import Variant

NATIVE = (224, 224)


def test_places_are_put_in_the_order_of_the_data():
    assert resize.parse("tokens@0.8+input") == (("input", None), ("tokens", 0.8))
    assert resize.parse("after:layer2.0@0.5+after:layer1+stem") == (
        ("stem", None),
        ("after:layer2.0", 0.5),
        ("after:layer1", None),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pathc", "unknown resize method 'pathc', did you mean 'patch'?; there are: after, input"),
        ("after", "at after: write after:MODULE, such as after:layer1"),
        ("after:", "at after:: write after:MODULE"),
        ("stem:conv1", "at stem:conv1: write after:MODULE"),
        ("stem+stem@0.5", "at stem+stem@0.5: stem is named twice"),
        ("stem@", "at stem@: the scale after @ must be a number > 0 and <= 1, such as stem@0.75"),
        ("stem@1.5", "at stem@1.5: the scale after @"),
        ("stem@nan", "at stem@nan: the scale after @"),
        ("input+", "unknown resize method ''"),
    ],
)
def test_what_is_no_place(text, message):
    with pytest.raises(ConfigError) as caught:
        resize.parse(text)

    assert str(caught.value).startswith(message)


def test_a_place_takes_its_own_scale_or_that_of_the_variant_from_what_is_left():
    assert resize.asked("stem", NATIVE, scale=0.75) == (Place(at="stem", resolution=(168, 168)),)
    assert resize.asked("input+tokens@0.5", NATIVE, scale=0.75) == (
        Place(at="input", resolution=(168, 168)),
        Place(at="tokens", resolution=(84, 84)),
    )
    assert resize.asked("input@0.5+stem", NATIVE, resolution=(96, 64)) == (
        Place(at="input", resolution=(112, 112)),
        Place(at="stem", resolution=(96, 64)),
    )


def test_a_place_that_changes_nothing_is_left_out():
    assert resize.asked("input@1+stem", NATIVE, scale=1.0) == ()
    assert resize.asked("input+stem@0.5", (1, 1), scale=1.0) == ()


@pytest.mark.parametrize(
    ("at", "name"),
    [
        ("input@0.75", "r168-int8"),
        ("stem@0.75", "r224-stem168-int8"),
        ("after:layer1.0@0.75", "r224-after-layer1.0-168-int8"),
        ("input@0.75+tokens@0.5", "r168-tokens84-int8"),
        ("input@1", "r224-int8"),
    ],
)
def test_a_variants_name_tells_its_places(at, name):
    plain = Variant(resolution=NATIVE, precision="int8")

    variant = resize.variant_of(plain, resize.asked(at, NATIVE), NATIVE)

    assert variant.id == name
    assert resize.places_of(variant, NATIVE) == resize.asked(at, NATIVE)


def test_a_methods_options_travel_in_the_variant_and_through_json():
    place = Place(at="tokens", resolution=(168, 168), options=(("schedule", (3, 2, 1)),))

    variant = resize.variant_of(Variant(resolution=NATIVE), (place,), NATIVE)
    again = serde.from_json(Variant, serde.loads(serde.dumps(variant)))

    assert variant.at == "tokens"
    assert variant.resize_options == (("tokens", (("resolution", (168, 168)), ("schedule", (3, 2, 1)))),)
    assert resize.places_of(again, NATIVE) == (place,)
    assert hash(dataclasses.replace(variant, quant=None)) == hash(variant)


def test_an_option_that_a_method_does_not_have_is_an_error():
    place = Place(at="stem", resolution=(8, 8), options=(("strength", 2),))

    with pytest.raises(ConfigError, match="at stem: unknown key 'strength'"):
        resize.apply(None, None, (place,))
