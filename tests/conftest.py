import dataclasses
import hashlib
import signal

import numpy as np
import pytest

from rdeploy.measured import Measurement, Memory
from rdeploy.results import (
    Accuracy,
    BuildResult,
    Comparison,
    Cost,
    EngineResult,
    Failure,
    Parity,
    Quantization,
    Result,
    Verification,
)
from rdeploy.types import Engine, ModelSpec, Preprocessing, Target, Variant

# What a script starts in its background ignores Ctrl-C, and so would every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SPEC = ModelSpec(
    name="tiny",
    source="examples.tiny:net",
    sha256="ab" * 32,
    native_resolution=(8, 8),
    preprocessing=Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear", crop_pct=1.0),
    labels=("red", "green\nish", "blue"),
    assumed=("crop_pct",),
)


def measurement(p50_ms, count=200):
    memory = Memory(weights=10, activations=20, workspace=None, process_peak=50_000_000, method=(("weights", "file"),))
    latencies = tuple(p50_ms + 0.001 * (i % 7 - 3) for i in range(count))
    return Measurement(batch=1, threads=2, latencies_ms=latencies, warmup=12, stable=True, memory=memory, load=0.5)


def engine(backend, content, *, path=None, **facts):
    return Engine(
        path=path or f"{backend}.onnx",
        sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content),
        backend=backend,
        backend_version="1.0",
        source_sha256="cd" * 32,
        build_s=0.5,
        build_peak_bytes=1000,
        device="a CPU",
        executed_precision=(("int8", 4), ("fp32", 1)),
        **facts,
    )


def passed(agreement=0.96):
    parity = Parity(max_abs_err=0.1, cosine=0.999, sqnr_db=21.5, top1_agreement=0.97, samples=40)
    share = Accuracy(
        metric="agreement",
        value=agreement,
        reference=1.0,
        drop=1 - agreement,
        ci95=(0.9, 0.99),
        samples=40,
        labelled=False,
    )
    top1 = dataclasses.replace(
        share, metric="top1", value=0.85, reference=0.9, drop=0.05, ci95=(0.64, 0.95), labelled=True
    )
    return Verification(passed=True, executed_by="onnxruntime 1.0", parity=parity, accuracy=top1, agreement=share)


def measured_engine(backend, content, p50_ms, *, speedup=None, path=None, verification=None):
    comparison = None
    if speedup is not None:
        interval = (speedup - 0.05, speedup + 0.05)
        comparison = Comparison(
            backend=backend, speedup=speedup, speedup_ci95=interval, memory_ratio=0.8, size_ratio=0.25, verdict="faster"
        )
    return EngineResult(
        backend=backend,
        engine=engine(backend, content, path=path),
        verification=verification or passed(),
        measurement=measurement(p50_ms),
        comparison=comparison,
    )


def build_result():
    """One INT8 variant on two CPU runtimes, ahead-of-time for a GPU that is not here, and failed on a third."""
    quantization = Quantization(
        calibrator="percentile", samples=40, images_sha256="ef" * 32, skipped=(("head", "first layer"),), coverage=0.97
    )
    cost = Cost(macs=2_000_000, params=1000, weight_bytes=4000, activation_bytes=9000)
    ahead = EngineResult(
        backend="tensorrt_rtx", engine=engine("tensorrt_rtx", b"gpu", path="sm_89.engine", built_for=("sm_89",))
    )
    broken = EngineResult(
        backend="reference",
        failure=Failure(stage="build", error="StageError", message="no such op", reproduce="rdeploy worker j"),
    )
    row = Result(
        variant=Variant(resolution=(6, 6), precision="int8"),
        target="cpu",
        status="ok",
        engines=(
            measured_engine("onnxruntime", b"slow engine", 2.0, speedup=1.5),
            measured_engine("openvino", b"<xml/>", 1.0, speedup=2.5, path="openvino.xml"),
            ahead,
            broken,
        ),
        cost=cost,
        quantization=quantization,
        reproduce="rdeploy build 'my model' --scale 0.75",
        notes=("snapped from 5 to 6",),
    )
    baseline = Result(
        variant=Variant(resolution=(8, 8)),
        target="cpu",
        status="ok",
        engines=(measured_engine("onnxruntime", b"base", 3.0), measured_engine("openvino", b"base", 2.5)),
        cost=cost,
    )
    return BuildResult(
        spec=SPEC,
        target=Target(name="cpu", backends=("tensorrt_rtx", "openvino", "onnxruntime")),
        baseline=baseline,
        variants=(row,),
        environment=(("cpu", "a CPU"), ("runtimes", (("openvino", "1.0"),)), ("python", "3.11")),
        timings_s=(("load", 1.0), ("export", 2.5)),
        notes=("40 images: ranges may not cover what the model will see",),
    )


@pytest.fixture
def result():
    return build_result()


@pytest.fixture
def written(tmp_path, result):
    """A bundle on disk, made from files of known content."""
    from rdeploy import bundle

    source = tmp_path / "built"
    source.mkdir()
    files = {
        "onnxruntime.onnx": b"slow engine",
        "openvino.xml": b"<xml/>",
        "openvino.bin": b"weights",
        "sm_89.engine": b"gpu",
    }
    for name, content in {**files, "job.json": b"{}", "worker.log": b"noise", "model.onnx": b"graph"}.items():
        (source / name).write_bytes(content)
    engines = dict.fromkeys(files, source)
    return bundle.write(
        tmp_path / "out" / "tiny-r6-int8",
        result=result,
        row=result.variants[0],
        onnx=source / "model.onnx",
        engines=engines,
        logs={"worker.log": source / "worker.log", "absent.log": source / "absent.log"},
    )


COLOURS = np.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]], np.float32)
"""Logits = the mean of each normalised channel x this: a classifier of red, green and blue."""


def colour_model(path):
    """Write the classifier of colours as ONNX, dynamic batch, input (N, 3, 6, 6)."""
    onnx = pytest.importorskip("onnx", reason="the model of this test is made with onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["y"]),
        ],
        "tiny",
        [helper.make_tensor_value_info("x", kind, ["n", 3, 6, 6])],
        [helper.make_tensor_value_info("y", kind, ["n", 3])],
        [onnx.numpy_helper.from_array(COLOURS, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.fixture
def tiny_onnx(tmp_path):
    return colour_model(tmp_path / "model.onnx")


@pytest.fixture
def tiny_bundle(tmp_path, result, tiny_onnx):
    """A bundle whose engine ONNX Runtime really runs."""
    from rdeploy import backends, bundle

    module = backends.find("onnxruntime")
    if reason := module.unavailable():
        pytest.skip(reason)
    built = module.build_engine(tiny_onnx, tmp_path / "engine", target=Target(name="cpu"), options=module.Options())
    engines = (EngineResult(backend="onnxruntime", engine=built),)
    row = dataclasses.replace(
        result.variants[0], variant=Variant(resolution=(6, 6)), engines=engines, quantization=None
    )
    folder = tmp_path / "tiny-r6-fp32"
    return bundle.write(folder, result=result, row=row, onnx=tiny_onnx, engines={built.path: tmp_path / "engine"})
