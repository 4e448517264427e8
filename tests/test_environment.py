import json
import subprocess
import sys

from rdeploy import environment, hardware, serde


def test_the_description_names_what_the_manifest_promises():
    facts = dict(environment.describe())

    assert {"cpu", "gpu", "driver", "runtimes", "python", "threads", "load"} <= set(facts)
    assert facts["threads"] == hardware.cores()
    assert facts["runtimes"]["numpy"]
    json.dumps(serde.to_json(facts), allow_nan=False)


def test_the_fingerprint_does_not_change_with_the_load(monkeypatch):
    before = environment.fingerprint()

    monkeypatch.setattr(environment.os, "getloadavg", lambda: (99.0, 1.0, 1.0))

    assert dict(environment.describe())["load"] == 99.0
    assert environment.fingerprint() == before


def test_the_fingerprint_changes_with_the_cpu_and_with_a_runtime(monkeypatch):
    before = environment.fingerprint()

    monkeypatch.setattr(hardware, "cpu_model", lambda: "another CPU")
    other_cpu = environment.fingerprint()
    monkeypatch.undo()
    monkeypatch.setattr(environment, "runtimes", lambda: (("onnxruntime", "0.0.1"),))
    other_runtime = environment.fingerprint()

    assert len({before, other_cpu, other_runtime}) == 3


def test_describing_imports_no_runtime():
    code = (
        "import sys; from rdeploy import environment; environment.describe();"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'openvino', 'tensorrt', 'numpy'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
