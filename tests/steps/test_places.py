"""What becomes of the places that were asked for, and what is told of it."""

from types import SimpleNamespace

from rdeploy import pipeline, resize
from rdeploy.resize import Place
from rdeploy.types import Variant

NATIVE = (224, 224)


def test_what_was_asked_for_is_told_by_its_place(monkeypatch):
    asked = (Place(at="input", resolution=(166, 166)), Place(at="stem", resolution=(84, 84)))
    found = (Place(at="input", resolution=(168, 168)), Place(at="stem", resolution=(82, 82)))
    variants = [resize.variant_of(Variant(resolution=NATIVE), places, NATIVE) for places in (asked, found)]
    monkeypatch.setattr(pipeline.places, "settled", lambda *_: variants[1])
    this = SimpleNamespace(
        request=SimpleNamespace(calib=None), steps=None, model=None, spec=SimpleNamespace(native_resolution=NATIVE)
    )

    settled, notes = pipeline.settled_variant(this, variants[0])

    assert settled == variants[1]
    assert notes == (
        "166 was asked for; 168 is the nearest that this model can take",
        "84 was asked for at stem; 82 is the nearest that this model can take",
    )
