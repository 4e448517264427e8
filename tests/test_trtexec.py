"""The build script of a bundle, run with a stand-in for trtexec, and what a real trtexec's exports become."""

import json
import shutil
import subprocess

import pytest

from rdeploy import serde, trtexec, trtexec_export
from rdeploy.errors import ConfigError
from rdeploy.types import Target, TensorInfo

STATIC = (TensorInfo(name="input", dtype="float32", shape=(1, 3, 8, 8)),)
DYNAMIC = (TensorInfo(name="input", dtype="float32", shape=(-1, 3, 8, 8)),)
MEASURED_LIKE_11 = ["--useCudaGraph", "--useSpinWait", "--noDataTransfers"]
VERSIONS = {"8.5": "8502", "8.6": "8600", "10.3": "100300", "10.16": "101602", "11.4": "110400"}

pytestmark = pytest.mark.skipif(shutil.which("sha256sum") is None, reason="the script needs sha256sum")


def target(batch_sizes=(1,), **options):
    given = tuple((key, value) for key, value in options.items())
    return Target(name="orin", batch_sizes=batch_sizes, backend_options=(("tensorrt", given),))


@pytest.fixture
def run(tmp_path):
    """Write the script into a bundle and run it; returns what trtexec was called with."""
    fake = tmp_path / "trtexec"
    bundle = tmp_path / "my bundle"
    bundle.mkdir()
    (bundle / "model.onnx").write_bytes(b"graph")

    def call(number, *words, inputs=STATIC, precision="fp32", fp16=False, to=None, damage=False, code=0, profiles=True):
        option = "echo '  --useProfile  Set the optimization profile'" if profiles else ":"
        fake.write_text(
            "#!/bin/sh\n"
            f'echo "&&&& RUNNING TensorRT.trtexec [TensorRT v{number}] # trtexec $*"\n'
            f'if [ "$1" = --help ]; then {option}; else printf "%s\\n" "$@" > "{tmp_path}/said"; fi\n'
            'case "$*" in *--fail*) exit 7 ;; esac\n'
        )
        fake.chmod(0o755)
        text = trtexec.script(
            "model.onnx", serde.file_sha256(bundle / "model.onnx"), inputs, to or target(),
            precision=precision, holds_fp16=fp16,
        )  # fmt: skip
        (bundle / trtexec.SCRIPT).write_text(text)
        if damage:
            (bundle / "model.onnx").write_bytes(b"other")
        done = subprocess.run(
            ["sh", bundle / trtexec.SCRIPT, *words], env={"TRTEXEC": str(fake), "PATH": "/usr/bin:/bin"},
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        said = tmp_path / "said"
        return (said.read_text().splitlines() if said.is_file() else []), done.stderr

    return call


@pytest.mark.parametrize(
    ("version", "precision", "fp16", "flags"),
    [
        ("8.5", "fp32", False, MEASURED_LIKE_11),
        ("8.5", "int8", False, ["--int8", *MEASURED_LIKE_11]),
        ("8.5", "int8", True, ["--int8", "--fp16", *MEASURED_LIKE_11]),
        ("8.6", "fp16", True, ["--fp16", *MEASURED_LIKE_11]),
        ("8.6", "mixed", True, ["--int8", "--fp16", *MEASURED_LIKE_11]),
        ("8.6", "mixed", False, ["--int8", *MEASURED_LIKE_11]),
        ("10.3", "int8", True, ["--stronglyTyped", *MEASURED_LIKE_11]),
        ("10.16", "fp16", True, ["--stronglyTyped", *MEASURED_LIKE_11]),
        ("11.4", "int8", True, []),
    ],
)
def test_every_version_gets_its_own_flags(run, version, precision, fp16, flags):
    words, said = run(VERSIONS[version], precision=precision, fp16=fp16)

    assert words == [
        "--onnx=model.onnx",
        "--saveEngine=engines/tensorrt/tensorrt.engine",
        "--profilingVerbosity=detailed",
        "--separateProfileRun",
        "--exportTimes=logs/trtexec.times.json",
        "--exportProfile=logs/trtexec.profile.json",
        "--exportLayerInfo=logs/trtexec.layers.json",
        "--timingCacheFile=logs/trtexec.timing.cache",
        *flags,
    ]
    assert said == ""


def test_a_dynamic_batch_becomes_a_shape_range(run):
    words, _ = run("110400", inputs=DYNAMIC, to=target((2, 1, 8)))

    assert "--minShapes=input:1x3x8x8" in words
    assert "--optShapes=input:2x3x8x8" in words
    assert "--maxShapes=input:8x3x8x8" in words


def test_an_engine_tuned_for_another_batch_is_measured_at_the_targets_first(run):
    words, _ = run("110400", inputs=DYNAMIC, to=target(batch_sizes=(1, 8), batch_ranges=((1, 8, 16),)))

    assert {"--optShapes=input:8x3x8x8", "--shapes=input:1x3x8x8"} <= set(words)


PROFILES = [
    "--profile=0", "--minShapes=input:1x3x8x8", "--optShapes=input:1x3x8x8", "--maxShapes=input:4x3x8x8",
    "--profile=1", "--minShapes=input:5x3x8x8", "--optShapes=input:16x3x8x8", "--maxShapes=input:64x3x8x8",
]  # fmt: skip


@pytest.mark.parametrize(("batch", "more"), [(1, ["--useProfile=0"]), (16, ["--useProfile=1"])])
def test_several_ranges_are_several_profiles(run, batch, more):
    words, said = run("100300", inputs=DYNAMIC, to=target((batch,), batch_ranges=((1, 1, 4), (5, 16, 64))))

    first = words.index("--profile=0")
    assert words[first : first + len(PROFILES) + 1] == [*PROFILES, *more]
    assert said == ""


def test_the_batch_sizes_are_profiles_of_their_own_where_the_target_says_so(run):
    words, _ = run("110400", inputs=DYNAMIC, to=target((1, 8, 32), profile_per_batch=True))

    assert [word for word in words if word.startswith(("--profile=", "--minShapes", "--maxShapes"))] == [
        "--profile=0", "--minShapes=input:1x3x8x8", "--maxShapes=input:1x3x8x8",
        "--profile=1", "--minShapes=input:2x3x8x8", "--maxShapes=input:8x3x8x8",
        "--profile=2", "--minShapes=input:9x3x8x8", "--maxShapes=input:32x3x8x8",
    ]  # fmt: skip


def test_a_trtexec_without_profiles_gets_one_range_and_says_so(run):
    words, said = run("8602", inputs=DYNAMIC, to=target(batch_ranges=((1, 1, 4), (5, 16, 64))), profiles=False)

    assert {"--minShapes=input:1x3x8x8", "--optShapes=input:1x3x8x8", "--maxShapes=input:64x3x8x8"} <= set(words)
    assert not [word for word in words if "rofile=" in word and "export" not in word]
    assert "TensorRT v8602 has none of: several optimization profiles: batch 1 to 64 is one, tuned for 1" in said


def test_a_batch_of_the_target_outside_its_ranges_is_refused():
    with pytest.raises(ConfigError, match="batch 8 of the target is in none of the batch_ranges"):
        trtexec.script("m.onnx", "0", DYNAMIC, target((1, 8), batch_ranges=((1, 1, 4),)), precision="fp32")


OPTIONS = {
    "workspace_mb": 64,
    "sparse_weights": True,
    "refit": True,
    "tf32": False,
    "optimization_level": 5,
    "hardware_compatibility": "ampere_plus",
    "version_compatible": True,
    "strip_weights": True,
}


def test_the_profiles_options_become_flags(run):
    words, said = run("101602", to=target(**OPTIONS))

    assert {
        "--memPoolSize=workspace:64", "--sparsity=enable", "--refit", "--noTF32", "--builderOptimizationLevel=5",
        "--hardwareCompatibilityLevel=ampere+", "--versionCompatible", "--excludeLeanRuntime", "--stripWeights",
    } <= set(words)  # fmt: skip
    assert said == ""


def test_the_libraries_that_kernels_come_from(run):
    wanted = "--tacticSources=-CUBLAS,-CUBLAS_LT,+CUDNN,-EDGE_MASK_CONVOLUTIONS,-JIT_CONVOLUTIONS"

    words, said = run("8600", to=target(tactic_sources=("CUDNN",)))
    newer, refused = run("110400", to=target(tactic_sources=("CUDNN",)))

    assert wanted in words
    assert said == ""
    assert wanted not in newer
    assert "TensorRT v110400 has none of: --tacticSources" in refused


def test_what_an_old_version_does_not_have_is_left_out_and_told(run):
    words, said = run("8502", to=target(**OPTIONS))

    assert not {"--builderOptimizationLevel=5", "--versionCompatible", "--stripWeights"} & set(words)
    assert "--sparsity=enable" in words
    assert "TensorRT v8502 has none of: --builderOptimizationLevel=5 --hardwareCompatibilityLevel=ampere+" in said


@pytest.mark.parametrize(
    ("version", "precision", "flags"),
    [
        ("8.5", "fp32", {"--fp16"}),
        ("8.6", "int8", {"--int8", "--fp16"}),
        ("10.3", "fp32", {"--fp16"}),
        ("10.16", "int8", {"--int8", "--fp16"}),
        ("11.4", "fp32", set()),
    ],
)
def test_dla_is_typed_by_flags_before_11_and_never_fp32(run, version, precision, flags):
    words, _ = run(VERSIONS[version], precision=precision, to=target(dla_core=1))

    assert {"--useDLACore=1", "--allowGPUFallback"} <= set(words)
    assert {"--fp16", "--int8", "--stronglyTyped"} & set(words) == flags


def test_further_arguments_go_to_trtexec(run):
    words, _ = run("110400", "--loadInputs=input:a b.bin", "--duration=10")

    assert words[-2:] == ["--loadInputs=input:a b.bin", "--duration=10"]


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ({"damage": True}, 1, "model.onnx was changed after it was made: copy the bundle again"),
        ({"number": "9300"}, 3, "trtexec reports TensorRT v9300; this script knows 8.5, 8.6, 10, 11"),
    ],
)
def test_what_the_script_refuses(run, how, code, message):
    words, said = run(how.pop("number", "110400"), code=code, **how)

    assert words == []
    assert message in said


TIMES = [
    {"startComputeMs": 1.0, "endComputeMs": 1.5, "h2dMs": 0, "computeMs": 0.5, "d2hMs": 0, "latencyMs": 0.5},
    {"startComputeMs": 2.0, "endComputeMs": 2.7, "inMs": 0, "computeMs": 0.75, "outMs": 0, "latencyMs": 0.75},
]
LAYERS = [
    {"count": 200},
    {"name": "conv1 + relu", "timeMs": 60.0, "averageMs": 0.25, "medianMs": 0.25, "percentage": 75.0},
    {"name": "fc", "timeMs": 20.0, "averageMs": 0.125, "medianMs": 0.125, "percentage": 25.0},
]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_times_of_both_generations_are_read(tmp_path):
    found = trtexec_export.measurement(write(tmp_path / "t.json", TIMES), batch=8)

    assert found.latencies_ms == (0.5, 0.75)
    assert (found.batch, found.threads) == (8, None)
    assert found.definition.startswith("GPU time of one inference between two CUDA events, as trtexec measured it")
    assert found.layers is None


def test_layers_sum_to_the_whole(tmp_path):
    found = trtexec_export.layers(write(tmp_path / "p.json", LAYERS))

    assert [(kernel.name, kernel.mean_ms) for kernel in found.kernels] == [("conv1 + relu", 0.25), ("fc", 0.125)]
    assert (found.runs, found.whole_ms, found.remainder_ms) == (200, 0.375, 0.0)


INFORMATION = {
    "Layers": [
        {
            "Name": "conv1 + relu",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Format/Datatype": "Four wide Int8 format"}],
        },
        {"Name": "fc", "LayerType": "gemm", "Inputs": [{"Format": "row major", "Datatype": "Half"}]},
        {"Name": "Reformatting CopyNode 1", "LayerType": "Reformat", "Inputs": [{"Format/Datatype": "Int8"}]},
    ],
    "Bindings": ["input"],
}


def test_layers_say_what_they_compute_in_and_which_of_the_model_they_are(tmp_path):
    found = trtexec_export.measurement(
        write(tmp_path / "t.json", TIMES),
        batch=1,
        profile=write(tmp_path / "p.json", LAYERS),
        information=write(tmp_path / "l.json", INFORMATION),
    )

    assert [(one.kind, one.precision, one.layers) for one in found.layers.kernels] == [
        ("CaskConvolution", "int8", ("conv1", "relu")),
        ("gemm", "fp16", ("fc",)),
    ]
    assert found.notes[-1] == "executed: 1 fp16, 1 int8, 1 reorder"


def test_layers_of_which_only_the_names_are_known(tmp_path):
    names = write(tmp_path / "l.json", {"Layers": ["conv1 + relu", "fc"]})

    found = trtexec_export.measurement(write(tmp_path / "t.json", TIMES), batch=1, information=names)

    assert len(found.notes) == 1
    with pytest.raises(ConfigError, match="not the layers of `trtexec --exportLayerInfo`: it has no Layers"):
        trtexec_export.layer_information(write(tmp_path / "other.json", LAYERS))


@pytest.mark.parametrize(
    ("inputs", "to", "words", "batch"),
    [
        (STATIC, {}, [], 1),
        (DYNAMIC, {"batch_sizes": (4, 8)}, [], 4),
        (DYNAMIC, {"batch_sizes": (1, 8)}, ["--shapes=input:8x3x8x8"], 8),
        (DYNAMIC, {"batch_sizes": (1, 8)}, ["--optShapes=input:2x3x8x8"], 2),
        (DYNAMIC, {"batch_sizes": (1, 8), "batch_ranges": ((1, 8, 16),)}, ["--optShapes=input:2x3x8x8"], 1),
        (DYNAMIC, {"batch_sizes": (16,), "batch_ranges": ((1, 1, 4), (5, 16, 64))}, [], 16),
        (DYNAMIC, {"batch_sizes": (16,), "batch_ranges": ((1, 2, 4), (5, 16, 64))}, ["--useProfile=0"], 2),
    ],
)
def test_the_batch_is_the_one_that_was_measured(run, tmp_path, inputs, to, words, batch):
    run("110400", *words, inputs=inputs, to=target(**to))
    write(tmp_path / "my bundle" / trtexec.TIMES, TIMES)

    (found,) = trtexec_export.of_bundle(tmp_path / "my bundle", {"build": {"batch_sizes": [99]}})

    assert found.measurement.batch == batch


def test_shapes_that_the_script_did_not_write_are_refused(tmp_path):
    write(tmp_path / trtexec.TIMES, TIMES)
    write(tmp_path / trtexec.SHAPES, "input")

    with pytest.raises(ConfigError, match="not the shapes that build-engine.sh measured"):
        trtexec_export.of_bundle(tmp_path, {})


def test_a_build_that_fails_leaves_no_shapes(run, tmp_path):
    run("110400", "--fail", code=7)

    assert not (tmp_path / "my bundle" / trtexec.SHAPES).exists()


def test_a_bundle_in_which_the_script_was_run_has_a_result(tmp_path):
    assert trtexec_export.of_bundle(tmp_path, {}) == ()
    write(tmp_path / trtexec.TIMES, TIMES)
    write(tmp_path / trtexec.PROFILE, LAYERS)
    write(tmp_path / trtexec.LAYERS, INFORMATION)

    (found,) = trtexec_export.of_bundle(tmp_path, {"build": {"batch_sizes": [4, 8]}})

    assert found.backend == "tensorrt (trtexec)"
    assert found.measurement.batch == 4
    assert [kernel.precision for kernel in found.measurement.layers.kernels] == ["int8", "fp16"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON, so no export of trtexec"),
        ("{}", "not an export of trtexec, which is a list"),
        ("[1]", "not an export of trtexec, which is a list"),
        ("[]", "not the times of `trtexec --exportTimes`"),
        ('[{"computeMs": 1}, {}]', "it has no computeMs in every row"),
        ('[{"computeMs": -1}]', "not the times of"),
        (json.dumps(LAYERS), "not the times of"),
    ],
)
def test_what_is_no_export_is_refused_in_one_line(tmp_path, content, message):
    with pytest.raises(ConfigError) as caught:
        trtexec_export.measurement(write(tmp_path / "t.json", content), batch=1)

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_times_are_no_layers(tmp_path):
    with pytest.raises(ConfigError, match="not the layers of `trtexec --exportProfile`"):
        trtexec_export.layers(write(tmp_path / "p.json", TIMES))
    with pytest.raises(ConfigError, match=r"cannot read .*none.json"):
        trtexec_export.layers(tmp_path / "none.json")
