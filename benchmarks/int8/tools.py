"""The tools that are compared: what each installs, which script runs it, and in which configurations."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Tool:
    """`requires` go into an environment of the tool's own; without any it runs in this one.

    `configs` are what is tried, by scheme; the best one of a scheme stands for the tool. `slow` ones take many minutes.
    """

    script: str
    requires: tuple[str, ...]
    affine: tuple[str, ...]
    symmetric: tuple[str, ...]
    slow: tuple[str, ...] = ()
    imports: str = ""
    transformer: tuple[str, ...] = ()


TOOLS = {
    "rdeploy": Tool(
        "run_rdeploy.py", (), ("affine auto",), ("symmetric auto",), slow=("affine thorough", "symmetric thorough"),
        transformer=("openvino auto", "affine scores", "symmetric scores", "affine attention", "symmetric attention"),
    ),
    "ort": Tool(
        "run_ort.py", ("onnxruntime", "onnx"),
        ("u8 min-max", "u8 percentile", "u8 entropy"), ("s8 min-max", "s8 percentile", "s8 entropy"), imports="onnxruntime",
    ),
    "nncf": Tool(
        "run_nncf.py", ("nncf>=3.4", "onnx", "onnxruntime"), ("mixed", "mixed accurate"),
        ("performance", "performance accurate"), imports="nncf",
    ),
    "modelopt": Tool(
        "run_modelopt.py", ("nvidia-modelopt[onnx]", "onnxruntime"), (), ("max", "entropy"), imports="modelopt.onnx"
    ),
    "inc": Tool(
        "run_inc.py", ("neural-compressor==2.6", "numpy<2", "onnx<1.17", "onnxruntime<1.20", "six", "setuptools"),
        ("u8 minmax", "u8 kl"), ("s8 minmax", "s8 kl"), imports="neural_compressor", transformer=("u8 smooth", "s8 smooth"),
    ),
    "aimet": Tool(
        "run_aimet.py", ("aimet-onnx",), ("u8 tf_enhanced", "u8 CLE+tf_enhanced", "u8 CLE+min_max"),
        ("s8 tf_enhanced", "s8 CLE+tf_enhanced", "s8 CLE+min_max"), slow=("u8 adaround", "s8 adaround"),
        imports="aimet_onnx",
    ),
}  # fmt: skip


def configs(name: str, network: str, *, slow: bool) -> list[tuple[str, str]]:
    """Return (scheme, configuration) of everything that a tool is tried with on a network."""
    tool = TOOLS[name]
    found = [("affine", c) for c in tool.affine] + [("symmetric", c) for c in tool.symmetric]
    extra = (*(tool.transformer if network.startswith("vit") else ()), *(tool.slow if slow else ()))
    return found + [("symmetric" if c.startswith(("s8", "symmetric")) else "affine", c) for c in extra]


def python(name: str, environments: Path) -> Path | str:
    """Return the Python that runs a tool, its environment made on the first call, or why there is none."""
    tool = TOOLS[name]
    if not tool.requires:
        return Path(sys.executable)
    found = environments / name / "bin" / "python"
    if not found.is_file():
        subprocess.run([sys.executable, "-m", "venv", environments / name], check=True)
        install = [found, "-m", "pip", "install", "-q", *tool.requires]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"not installed: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}"
    done = subprocess.run([found, "-c", f"import {tool.imports}"], capture_output=True, text=True, check=False)
    return found if not done.returncode else f"does not import: {(done.stderr.strip().splitlines() or ['?'])[-1]}"


def run(
    name: str, python: Path, config: str, files: tuple[Path, Path, Path], *, transformer: bool, limit_s: int
) -> str:
    """Quantize in a process of its own; return the last line that it printed.

    Raises:
        RuntimeError: it failed or took too long, with the reason.
    """
    script = Path(__file__).resolve().with_name(TOOLS[name].script)
    words = [python, script, *files, config, *(["--transformer"] if transformer and name == "nncf" else [])]
    try:
        done = subprocess.run(
            [str(word) for word in words],
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
            cwd=files[2].parent,  # Neural Compressor leaves a workspace where it runs
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"took longer than {limit_s} s") from error
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200])
    return done.stdout.strip().splitlines()[-1]
