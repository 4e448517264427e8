import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np
import pytest

from rdeploy import serde
from rdeploy.build_request import BuildRequest, LoadOptions
from rdeploy.errors import ConfigError
from rdeploy.measured import Measurement, Memory
from rdeploy.types import QuantOptions, Target, Timing, Variant

VALUES = (
    Variant(resolution=(168, 224), precision="int8", quant=QuantOptions(calibrator_options=(("percentile", 99.9),))),
    Target(name="x", backend_options=(("tensorrt", (("workspace_mb", 64),)),), timing=Timing(min_samples=3)),
    BuildRequest(model="m.pt", resolutions=((1, 2), (3, 4)), load=LoadOptions(mean=(0.5,), arch_kwargs=(("a", 1),))),
    Measurement(
        batch=1,
        threads=None,
        latencies_ms=(1.0, 2.5),
        warmup=3,
        stable=True,
        memory=Memory(weights=1, activations=None, workspace=0, process_peak=2, method=(("weights", "file"),)),
    ),
)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_dataclass_survives_json(value):
    text = serde.dumps(value)

    assert serde.from_json(type(value), json.loads(text)) == value


def test_an_unknown_key_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match="job.json: unknown key 'resolutoin'"):
        serde.from_json(Variant, {"resolutoin": [1, 2]}, where="job.json")


def test_a_missing_key_is_an_error():
    with pytest.raises(ConfigError, match="resolution"):
        serde.from_json(Variant, {"precision": "int8"})


def test_what_is_no_mapping_is_an_error():
    with pytest.raises(ConfigError, match="expected a mapping, found list"):
        serde.from_json(Variant, [1])


def test_numbers_json_does_not_know_become_null():
    assert serde.to_json({"a": math.nan, "b": math.inf, "c": np.float32(0.5), "d": np.int64(3)}) == {
        "a": None,
        "b": None,
        "c": 0.5,
        "d": 3,
    }


def test_the_digest_depends_on_content_not_on_order():
    @dataclass(frozen=True)
    class Pair:
        a: int
        b: tuple[int, ...]

    assert serde.digest({"x": 1, "y": 2}) == serde.digest({"y": 2, "x": 1})
    assert serde.digest(Pair(1, (2, 3))) == serde.digest({"a": 1, "b": [2, 3]})
    assert serde.digest(Pair(1, (2, 3))) != serde.digest(Pair(1, (3, 2)))


def test_a_files_hash_is_its_sha256(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"rdeploy" * 500_000)

    assert serde.file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
