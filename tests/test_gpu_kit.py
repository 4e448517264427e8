"""What is brought to a GPU host without packages: wheels and TensorRT 8.6.0, whole or in parts, and why it is not used."""

import importlib.util
import os
import platform
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
HERE = f"cp{sys.version_info[0]}{sys.version_info[1]}"


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import gpu_host
        import gpu_kit
        import gpu_parts
        import gpu_wheels

        yield SimpleNamespace(host=gpu_host, kit=gpu_kit, parts=gpu_parts, wheels=gpu_wheels)
    finally:
        sys.path.remove(str(BENCHMARKS))


def make_wheel(folder, name, **files):
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        for module, text in files.items():
            archive.writestr(f"{module.replace('__', '/')}.py", text)
    return folder / name


def make_kit(folder, content=b"", python="#!/bin/sh\nenv\n"):
    """A kit whose Python is a script, as pack_folder takes it."""
    (folder / "site" / "pkg").mkdir(parents=True)
    (folder / "site" / "pkg" / "data.bin").write_bytes(content)
    (folder / "python" / "bin").mkdir(parents=True)
    (folder / "python" / "bin" / "python3.10").write_text(python)
    (folder / "python" / "bin" / "python3.10").chmod(0o755)
    return folder


def run(runner):
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": "/asked"}
    said = subprocess.run([runner], env=env, capture_output=True, text=True, check=True)
    return dict(line.partition("=")[::2] for line in said.stdout.splitlines())


def test_a_kit_is_cut_into_parts_and_joined_again(scripts, tmp_path):
    content = random.Random(0).randbytes(20_000)

    parts = scripts.kit.pack_folder(make_kit(tmp_path / "made", content), tmp_path / "parts", part_mb=0.001)
    assert len(parts) > 1
    assert all(part.stat().st_size <= 1049 for part in parts)
    before = sorted(tmp_path.joinpath("parts").iterdir())
    runner = scripts.kit.brought(tmp_path / "parts", tmp_path / "place")

    assert (tmp_path / "place" / "kit" / "site" / "pkg" / "data.bin").read_bytes() == content
    assert runner == tmp_path / "place" / "trt-python"
    assert scripts.kit.brought(tmp_path / "parts", tmp_path / "place") == runner
    assert sorted(tmp_path.joinpath("parts").iterdir()) == before, "what was brought may be read-only"


def test_a_kit_that_was_unpacked_by_hand_gets_our_runner_and_the_wheels_that_it_lacks(scripts, tmp_path):
    brought, place = tmp_path / "brought", tmp_path / "place"
    make_kit(brought / "kit")
    (brought / "trt-python").write_text("#!/bin/sh\necho drops PYTHONPATH\n")
    make_wheel(brought, "some_pure-1.0-py3-none-any.whl", some_pure="")

    seen = run(scripts.kit.brought(brought, place))

    assert seen["PYTHONPATH"] == f"{brought / 'kit' / 'site'}:{place / 'site'}:/asked"
    assert seen["PYTHONHOME"] == str(brought / "kit" / "python")
    assert (place / "site" / "some_pure.py").is_file()


def test_the_wheel_of_tensorrt_itself_is_used_where_its_python_is(scripts, monkeypatch, tmp_path):
    wheel = f"tensorrt-8.6.0-{HERE}-none-manylinux_2_17_{platform.machine()}.whl"
    make_wheel(tmp_path / "brought", wheel, tensorrt="print('imported 8.6.0')")
    runner = scripts.kit.brought(tmp_path / "brought", tmp_path / "place")

    said = subprocess.run([runner, "-c", "import tensorrt"], capture_output=True, text=True, check=True).stdout

    assert said == "imported 8.6.0\n"
    monkeypatch.setattr(scripts.kit.sys, "executable", "/no/python")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(scripts.kit.NoKit, match=r"TensorRT 8.6.0 needs Python 3.\d+ there, and none is here"):
        scripts.kit.brought(tmp_path / "brought", tmp_path / "place")


def test_a_kit_can_be_fetched_where_packages_are(scripts, monkeypatch, tmp_path):
    asked = []

    def install(python, site):
        asked.append(python)
        (site / "tensorrt").mkdir(parents=True)

    monkeypatch.setattr(scripts.kit, "_VERSION", sys.version_info[:2])
    monkeypatch.setattr(scripts.kit, "_install", install)

    for _ in range(2):
        runner = scripts.kit.fetch(tmp_path / "place")

    assert asked == [sys.executable]
    assert f'"{tmp_path}/place/fetched:$PYTHONPATH"' in runner.read_text()


def test_what_pip_says_of_a_kit_that_cannot_be_fetched(scripts, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ERROR: no index' >&2\nexit 1\n")
    python.chmod(0o755)

    with pytest.raises(scripts.kit.NoKit, match="pip did not install tensorrt==8.6.0: ERROR: no index"):
        scripts.kit._install(str(python), tmp_path / "site")


@pytest.mark.skipif(shutil.which("ldd") is None, reason="ldd tells what a module links")
def test_the_python_of_a_kit_brings_what_its_modules_link(scripts, tmp_path):
    import _ctypes

    library, modules = tmp_path / "prefix" / "lib", tmp_path / "prefix" / "lib" / "python3.10" / "lib-dynload"
    modules.mkdir(parents=True)
    for path in (library / "libpython3.10.so.1.0", library / "python3.10" / "os.py", modules.parent / "test" / "t.py"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    (tmp_path / "prefix" / "bin").mkdir()
    shutil.copy(sys.executable, tmp_path / "prefix" / "bin" / "python3.10")
    shutil.copy(_ctypes.__file__, modules)

    scripts.kit.copy_python(tmp_path / "prefix", tmp_path / "kit")

    copied = {path.relative_to(tmp_path / "kit" / "lib").as_posix() for path in (tmp_path / "kit" / "lib").rglob("*")}
    assert {"libpython3.10.so.1.0", "python3.10/os.py"} <= copied
    assert "python3.10/test" not in copied
    linked = {path.name for path in scripts.kit.linked(modules)}
    assert {name for name in linked if name.startswith("libffi")} <= copied
    assert not copied & {"libc.so.6", "libm.so.6"}


@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("nm")), reason="stubs are compiled: needs gcc and nm")
def test_stubs_are_compiled_for_what_the_plugins_link(scripts, tmp_path):
    source = "void cudnnCreate(void);\nvoid use(void) { cudnnCreate(); }\n"
    real = tmp_path / "libcudnn.so.8"
    compiled = ["gcc", "-shared", "-fPIC", "-x", "c", "-"]
    (tmp_path / "v.map").write_text("libcudnn.so.8 { global: *; };\n")
    versioned = ["-Wl,-soname,libcudnn.so.8", f"-Wl,--version-script={tmp_path / 'v.map'}", "-o", real]
    subprocess.run([*compiled, *versioned], input="void cudnnCreate(void) {}\n", text=True, check=True)
    plugin = ["-o", tmp_path / "libnvinfer_plugin.so.8", "-x", "none", real]
    subprocess.run([*compiled, *plugin], input=source, text=True, check=True)

    assert scripts.kit.write_stubs(tmp_path, tmp_path / "stubs") == {"libcudnn.so.8": 1}
    call = f"import ctypes; ctypes.CDLL({str(tmp_path / 'stubs' / 'libcudnn.so.8')!r}).cudnnCreate()"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-6, "stub called: cudnnCreate\n")


def test_a_host_without_a_compiler_says_so(scripts, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(
        scripts.kit.NoKit, match="needs stub libraries, and nm does not start: No such file or directory"
    ):
        scripts.kit.write_stubs(tmp_path, tmp_path / "stubs")


@pytest.mark.parametrize("damage", ["shorter", "gone"])
def test_a_damaged_part_is_refused(scripts, tmp_path, damage):
    parts = scripts.kit.pack_folder(
        make_kit(tmp_path / "made", random.Random(0).randbytes(4000)), tmp_path / "p", 0.001
    )
    last = parts[-1]
    last.write_bytes(last.read_bytes()[:-1]) if damage == "shorter" else last.unlink()

    with pytest.raises(scripts.parts.Damaged, match=rf"{last.name} is missing or damaged: bring it again"):
        scripts.kit.brought(tmp_path / "p", tmp_path / "place")


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda scripts, folder: None, "has neither the parts kit.tar.xz.000 and so on, nor a wheel of TensorRT 8.6.0"),
        (lambda scripts, folder: (folder / "kit.tar.xz.000").write_bytes(b"x"), "has no checksums of the parts of kit"),
        (
            lambda scripts, folder: broken_archive(scripts, folder),
            "kit.tar.xz.000 and its further parts are no archive",
        ),
        (
            lambda scripts, folder: make_kit(folder / "kit", python="#!/bin/sh\necho no module x >&2; exit 1"),
            "the Python for TensorRT 8.6.0 does not start: no module x",
        ),
    ],
)
def test_whatever_is_wrong_with_a_kit_is_the_reason_of_its_rows_and_ends_nothing(scripts, tmp_path, prepare, reason):
    (tmp_path / "brought").mkdir()
    prepare(scripts, tmp_path / "brought")

    host = scripts.host.find(tmp_path / "work", brought=tmp_path / "brought", fetch_kit=False)

    assert host.kit is None
    assert reason in host.no_kit


def broken_archive(scripts, folder):
    (folder / "kit.tar.xz.000").write_bytes(b"no archive")
    scripts.parts.note_sums(folder, [folder / "kit.tar.xz.000"])


def test_without_a_kit_a_sentence_says_how_to_get_one(scripts, tmp_path):
    host = scripts.host.find(tmp_path, brought=None, fetch_kit=False)

    assert host.no_kit == (
        "no TensorRT 8.6.0: `make gpu-check ARGS=--fetch-kit` installs it where pip and a Python 3.10 are, "
        "`--wheels FOLDER` takes one that `gpu_kit.py pack` made elsewhere"
    )


def test_a_kit_that_starts_is_used_and_sees_rdeploy(scripts, tmp_path):
    make_kit(tmp_path / "brought" / "kit", python=f'#!/bin/sh\necho "$@" > {tmp_path}/said; env >> {tmp_path}/said\n')

    host = scripts.host.find(tmp_path / "work", brought=tmp_path / "brought", fetch_kit=False)

    assert host.kit == tmp_path / "work" / "tensorrt-8.6.0" / "trt-python"
    said = (tmp_path / "said").read_text()
    assert said.startswith("-c import numpy, tensorrt; from cuda.bindings import runtime; from rdeploy import backends")
    assert f"{tmp_path / 'brought' / 'kit' / 'site'}:" in said
    assert f":{BENCHMARKS.parent}:{BENCHMARKS}\n" in said


@pytest.mark.parametrize(
    ("name", "version", "fits"),
    [
        ("a-1.0-py3-none-any.whl", (3, 12), True),
        ("a-1.0-py2.py3-none-any.whl", (3, 10), True),
        ("a-1.0-cp310-cp310-manylinux_2_17_MACHINE.whl", (3, 10), True),
        ("a-1.0-cp310-cp310-manylinux_2_17_MACHINE.manylinux2014_MACHINE.whl", (3, 12), False),
        ("a-1.0-1-cp36-abi3-manylinux_2_17_MACHINE.whl", (3, 12), True),
        ("a-1.0-cp312-abi3-manylinux_2_17_MACHINE.whl", (3, 10), False),
        ("a-1.0-py3-none-manylinux_2_17_MACHINE.whl", (3, 12), True),
        ("a-1.0-py3-none-manylinux_2_17_ppc64le.whl", (3, 12), False),
        ("a-1.0-cp312-cp312-win_amd64.whl", (3, 12), False),
    ],
)
def test_which_wheels_fit(scripts, name, version, fits):
    assert scripts.wheels.fits(name.replace("MACHINE", platform.machine()), version) == fits


def test_wheels_lie_in_one_folder_for_the_python_that_they_fit(scripts, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", list(sys.path))
    brought = tmp_path / "brought"
    make_wheel(brought, "one-1.0-py3-none-any.whl", nvidia__one="value = 7\n")
    make_wheel(brought, f"two-1.0-{HERE}-none-linux_{platform.machine()}.whl", nvidia__two="")
    make_wheel(brought, f"old-1.0-cp27-none-linux_{platform.machine()}.whl", old="")
    make_wheel(brought, f"tensorrt-8.6.0-{HERE}-none-linux_{platform.machine()}.whl", tensorrt="")
    (brought / "broken-1.0-py3-none-any.whl").write_bytes(b"no zip")

    host = scripts.host.find(tmp_path / "work", brought=brought, fetch_kit=False)

    (site,) = map(Path, host.paths)
    assert sys.path[0] == str(site)
    assert sorted(path.relative_to(site).as_posix() for path in site.rglob("*.py")) == [
        "nvidia/one.py",
        "nvidia/two.py",
    ]
    spec = importlib.util.spec_from_file_location("of_a_wheel", site / "nvidia" / "one.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.value == 7


def test_a_wheel_in_parts_is_joined_and_one_that_is_damaged_is_told(scripts, tmp_path):
    brought, names = tmp_path / "brought", ["one-1.0-py3-none-any.whl", "two-1.0-py3-none-any.whl"]
    for name in names:
        make_wheel(brought, name, **{name[:3]: "#" * 3000})
    parts = scripts.parts.cut(brought, part_mb=0.001)
    assert len(parts) > 4
    assert scripts.parts.names(brought, ".whl") == names

    assert scripts.wheels.site(brought, names, tmp_path / "place" / "site") == []
    assert {path.name for path in (tmp_path / "place" / "site").glob("*.py")} == {"one.py", "two.py"}
    parts[0].write_bytes(b"other")
    (problem,) = scripts.wheels.site(brought, names, tmp_path / "new" / "site")
    assert problem.startswith("one-1.0-py3-none-any.whl: ")
    assert problem.endswith("one-1.0-py3-none-any.whl.000 is missing or damaged: bring it again")
    assert {path.name for path in (tmp_path / "new" / "site").glob("*.py")} == {"two.py"}


def test_checksums_of_other_tools_are_read(scripts, tmp_path):
    make_wheel(tmp_path, "one-1.0-py3-none-any.whl", one="")
    (tmp_path / "one-1.0-py3-none-any.whl").rename(tmp_path / "one-1.0-py3-none-any.whl.000")
    said = subprocess.run(
        ["sha256sum", "--binary", "./one-1.0-py3-none-any.whl.000"], cwd=tmp_path, capture_output=True
    )
    (tmp_path / "SHA256SUMS").write_bytes(said.stdout)

    assert scripts.wheels.site(tmp_path, ["one-1.0-py3-none-any.whl"], tmp_path / "place" / "site") == []
