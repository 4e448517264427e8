import hashlib

import pytest

from rdeploy import backends
from rdeploy.backends import _engine
from rdeploy.errors import ConfigError, MissingDependency


def test_the_hash_of_a_single_file_is_its_sha256(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"content")

    assert backends.engine_sha256(path) == hashlib.sha256(b"content").hexdigest()


def test_the_hash_of_an_ir_covers_its_weights(tmp_path):
    path = tmp_path / "a.xml"
    path.write_bytes(b"<net/>")
    path.with_suffix(".bin").write_bytes(b"one")
    before = backends.engine_sha256(path)

    path.with_suffix(".bin").write_bytes(b"two")

    assert backends.engine_files(path) == (path, tmp_path / "a.bin")
    assert backends.engine_sha256(path) != before


def test_an_ir_without_its_weights_is_refused(tmp_path):
    path = tmp_path / "a.xml"
    path.write_bytes(b"<net/>")

    with pytest.raises(ConfigError, match=r"cannot read the engine .*a.xml: No such file or directory \(.*a.bin\)"):
        backends.engine_sha256(path)


def test_a_package_that_is_not_installed_is_missing_with_its_command():
    assert _engine.missing("no_such_package", "Nothing", "pip install nothing") == (
        "Nothing is not installed here; install it with: pip install nothing"
    )
    with pytest.raises(MissingDependency, match="Nothing is not installed here; install it with: pip install nothing"):
        _engine.load("no_such_package", "Nothing", "pip install nothing")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('libx.so.1: cannot open')", "libx.so.1: cannot open"),
        ("import absent_xyz", "No module named"),
    ],
)
def test_a_package_that_does_not_load_says_why(tmp_path, monkeypatch, source, reason):
    (tmp_path / "broken_vendor.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(MissingDependency) as caught:
        _engine.load("broken_vendor", "Vendor", "pip install vendor")

    assert str(caught.value).startswith("Vendor does not load: ")
    assert reason in str(caught.value)


def test_openvinos_source_positions_are_left_out():
    error = RuntimeError("Exception from src/a.cpp:1:\nException from src/b.cpp:2:\nUnable to read the model\nmore\n")

    assert _engine.first_line(error) == "Unable to read the model"
    assert _engine.first_line(RuntimeError("")) == "RuntimeError"


def test_openvinos_failed_checks_are_left_out_for_the_cause():
    text = (
        "Exception from src/inference/src/cpp/core.cpp:84:\nCheck 'false' failed at src/frontends/ops_report.cpp:151:\n"
        "FrontEnd API failed with OpConversionFailure:\nModel wasn't fully converted. Failed operations detailed log:\n"
        "-- Mul-18 with a message:\n"
        "While validating ONNX node '<Node(Mul): val_20>': Check 'TRShape::merge(a, b)' failed at src/core/elt.hpp:26:\n"
        "While validating node 'opset1::Multiply (Slice[0]:f32[1,4]) -> (dynamic[...])' with friendly_name 'Multiply_143':\n"
        "Argument shapes are inconsistent.\n\nSummary:\n-- Conversion is failed for: Mul-18\n"
    )

    said = _engine.first_line(RuntimeError(text))

    assert said == "While validating ONNX node '<Node(Mul): val_20>': Argument shapes are inconsistent."
    assert _engine.first_line(RuntimeError("Check 'x > 0' failed at src/a.cpp:7:\nno device")) == "no device"
