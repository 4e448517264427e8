"""The layers of the package, read from its source: base <- stages <- manifest .. worker <- pipeline <- cli."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import rdeploy

ROOT = Path(rdeploy.__file__).parent

BASE = (
    "types", "build_request", "measured", "adapted", "results", "errors", "plugins", "serde", "store", "targets", "hardware",
    "nvml", "jetson", "machine", "environment", "capabilities", "strict_yaml", "pareto", "spread", "transfer",
    "option_values",
)  # fmt: skip
STAGES = (
    "models", "data", "resize", "adapt", "export", "quantize", "backends", "verify", "measure", "memory", "energy",
)  # fmt: skip
ABOVE = (
    ("snapshot", "budgets", "intervals"),
    ("changepoints",),
    ("evidence",),
    ("verdicts",),
    ("regress",),
    ("manifest", "preflight", "trtexec", "recommend"),
    ("report",),
    ("bundle", "trtexec_export", "usability"),
    ("rebuild",),
    ("triton",),
    ("runtime", "runs", "worker", "doctor", "expectations"),
    ("baseline", "launches", "scores"),
    ("gate", "history"),
    ("request", "search", "sampling"),
    ("search_request", "run_store", "steps", "relation"),
    ("choosing", "prospects"),
    ("standing",),
    ("intake",),
    ("compare", "disagreements", "splits", "rungs"),
    ("quantization_errors", "variations"),
    ("adaptation",),
    ("pipeline",),
    ("judging", "space"),
    ("node",),
    ("cluster",),
    ("rounds",),
    ("drawing", "candidates"),
    ("profiling", "optimization"),
    ("api",),
    ("cli",),
)
LAYERS = (BASE, ("graph", "pt2", "metrics", "modes"), STAGES, *ABOVE, ("__main__",))
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

HEAVY = {
    "torch", "torchvision", "timm", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "scipy",
    "safetensors", "tensorrt", "tensorrt_rtx_bindings", "cuda", "ray", "optuna",
}  # fmt: skip
MODEL_SIDE = {"torch", "torchvision", "timm", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors"}
NEEDS_THE_MODEL_SIDE = {
    "models",
    "resize",
    "adapt",
    "export",
    "graph",
    "pt2",
    "quantize",
    "steps",
    "adaptation",
    "rungs",
    "intake",
    "pipeline",
    "profiling",
    "api",
    "cli",
}


@dataclass(frozen=True)
class Import:
    file: Path
    line: int
    module: str
    """Absolute; `from rdeploy import errors` is `rdeploy.errors`."""
    at_import: bool
    """Executed when the module is imported, not only when a function of it is called."""

    @property
    def component(self) -> str:
        """The part of the package that imports: `quantize` of rdeploy/quantize/qdq.py."""
        relative = self.file.relative_to(ROOT)
        return relative.parts[0].removesuffix(".py")

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    @property
    def imported_component(self) -> str | None:
        parts = self.module.split(".")
        return parts[1] if parts[0] == "rdeploy" and len(parts) > 1 and parts[1] in LEVEL else None

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT.parent)}:{self.line} imports {self.module}"


def imports_of(file: Path) -> Iterator[Import]:
    yield from _walk(ast.parse(file.read_text()), file, at_import=True)


def _walk(node: ast.AST, file: Path, *, at_import: bool) -> Iterator[Import]:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        node = ast.Module(body=node.orelse, type_ignores=[])
    if isinstance(node, ast.Import):
        yield from (Import(file, node.lineno, alias.name, at_import) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
            yield Import(file, node.lineno, f"{_absolute(node, file)}.{alias.name}", at_import)
    inside = at_import and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, file, at_import=inside)


def _absolute(node: ast.ImportFrom, file: Path) -> str:
    if not node.level:
        return node.module or ""
    parents = file.relative_to(ROOT.parent).parts[: -node.level]
    return ".".join([*parents, *([node.module] if node.module else [])])


FILES = sorted(ROOT.rglob("*.py"))
IMPORTS = [found for file in FILES for found in imports_of(file)]


def test_every_module_has_a_place_in_the_layers():
    components = {file.relative_to(ROOT).parts[0].removesuffix(".py") for file in FILES} - {"__init__"}

    assert components <= set(LEVEL)


def test_imports_go_one_way_and_stages_never_import_each_other():
    wrong = []
    for found in IMPORTS:
        target = found.imported_component
        if target is None or found.component in (target, "__init__") or {found.component, target} <= set(BASE):
            continue
        if LEVEL[found.component] <= LEVEL[target]:
            wrong.append(str(found))

    assert wrong == []


def test_what_runs_on_a_device_never_imports_the_model_side():
    wrong = [
        str(found)
        for found in IMPORTS
        if found.package in MODEL_SIDE
        and found.component not in NEEDS_THE_MODEL_SIDE
        and found.file.name not in ("reference.py", "torch.py", "torch_compile.py")
    ]

    assert wrong == []


def test_the_light_path_imports_nothing_heavy_when_it_is_imported():
    lazy_only = {"models", "resize", "adapt", "export", "graph", "pt2", "quantize"}
    wrong = []
    for found in IMPORTS:
        loaded_lazily = found.component in lazy_only and found.file.name != "__init__.py"
        if found.at_import and found.package in HEAVY and not loaded_lazily:
            wrong.append(str(found))

    assert wrong == []


def test_the_command_line_imports_only_click_and_the_base_when_it_is_imported():
    allowed = {
        "click",
        "rdeploy.errors",
        "rdeploy.plugins",
        "rdeploy.types",
        "rdeploy.results",
        "rdeploy.build_request",
        "rdeploy.measured",
        "rdeploy.adapted",
        "rdeploy.serde",
        "rdeploy.cli",
        "rdeploy",
    }
    wrong = []
    for found in IMPORTS:
        if found.component != "cli" or not found.at_import or found.package not in ("rdeploy", "numpy", "rich", "yaml"):
            continue
        if not any(found.module == name or found.module.startswith(f"{name}.") for name in allowed - {"rdeploy"}):
            wrong.append(str(found))

    assert [one for one in wrong if not one.endswith("rdeploy.__version__")] == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.nn", [("torch.nn", True)]),
        ("def f():\n    from scipy import stats", [("scipy.stats", False)]),
        ("if TYPE_CHECKING:\n    import torch\nelse:\n    import onnx", [("onnx", True)]),
        ("from ..errors import ConfigError", [("rdeploy.errors.ConfigError", True)]),
        ("class A:\n    import onnx", [("onnx", True)]),
        ("try:\n    import onnx\nexcept ImportError:\n    pass", [("onnx", True)]),
    ],
)
def test_the_reader_of_imports_finds_them(source, expected):
    file = ROOT / "data" / "made_up.py"
    found = _walk(ast.parse(source), file, at_import=True)

    assert [(one.module, one.at_import) for one in found] == expected
