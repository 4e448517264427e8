"""Read a `.pt2` archive before PyTorch acts on it: what is not plain data, and could run code, is refused by name.

`torch.export.load` unpickles, imports what argument structures name, evaluates symbolic sizes and guards, and generates
Python from the names in the file. Everything here is an allow-list: what it does not know, it refuses.
"""

from __future__ import annotations

import ast
import io
import json
import pickle
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rdeploy.errors import ConfigError

_PLAIN = re.compile(r"[\w.\-:/\[\]]*")
_SYMBOL = re.compile(r"[a-z]{1,4}_?\d+")
_EXPRESSION_NAMES = re.compile(
    "Symbol|Integer|Float|Rational|One|Zero|NegativeOne|Half|positive|nonnegative|integer|real|finite|zero|nonzero|even|"
    "True|False|precision|true|false|BooleanTrue|BooleanFalse|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|"
    "IntTrueDiv|FloatTrueDiv|ModularIndexing|Where|PowByNatural|FloatPow|CeilToInt|FloorToInt|TruncToInt|RoundToInt|"
    "LShift|RShift|ToFloat|Identity|Eq|Ne|Lt|Le|Gt|Ge|Equality|Unequality|LessThan|GreaterThan|StrictLessThan|"
    "StrictGreaterThan|And|Or|Not|Piecewise|ExprCondPair|Abs|floor|ceiling|oo|int_oo|IntInfinity|NegativeIntInfinity"
)
_TREE_TYPES = frozenset(
    ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", "torch.Size", None)
)
_OPERATORS = re.compile("add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|getitem|eq|ne|lt|le|gt|ge|and_|or_|not_")
_HIGHER_ORDER = frozenset(("cond", "wrap_with_set_grad_enabled", "wrap_with_autocast"))
_UNSAFE_ATEN = frozenset(("from_file",))
_FREE_TEXT = frozenset(("metadata", "stack_trace", "doc", "torch_version"))
_LEGACY_WEIGHTS = re.compile(r"data/(weights|constants)/[^/]*\.pt")


_WANTED = re.compile(r"GLOBAL ([A-Za-z_][\w.]*)")


def refused_global(error: Exception) -> str | None:
    """Return the class or function that a refused pickle asked for, from PyTorch's message."""
    text = str(error)
    if found := _WANTED.search(text):
        return found.group(1)
    return "code" if "weights_only" in text.lower() and "unsupported" in text.lower() else None


def check_safe(path: Path) -> None:
    """Read what `torch.export.load` would act on.

    Raises:
        ConfigError: something in the file is not plain data; the message names it.
    """
    reader = torch._C.PyTorchFileReader(str(path))
    for name in reader.get_all_records():
        if name.startswith("data/aotinductor/") or name.endswith((".so", ".dll", ".pyd")):
            raise ConfigError(_refusal(path, f"compiled code ({name})"))
        if name.startswith(("data/constants/opaque_obj", "data/constants/custom_obj")):
            raise ConfigError(_refusal(path, f"a pickled object ({name})"))
        if name.startswith("data/sample_inputs/") or _LEGACY_WEIGHTS.fullmatch(name):
            _check_pickle(path, name, reader.get_record(name))
        if name.startswith("models/"):
            for problem in _problems(json.loads(reader.get_record(name))):
                raise ConfigError(_refusal(path, problem))
        if name.endswith("_config.json"):
            for entry in json.loads(reader.get_record(name)).get("config", {}).values():
                if entry.get("use_pickle"):
                    folder = name.rsplit("/", 1)[0]
                    record = f"{folder}/{entry.get('path_name', '')}"
                    _check_pickle(path, record, reader.get_record(record))


def _refusal(path: Path, what: str) -> str:
    return f"{path} holds {what}, and opening it could run any code: refused; pass --trust-pickle if you trust the file"


def _check_pickle(path: Path, name: str, data: bytes) -> None:
    if not data:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = refused_global(error) or "something unknown"
        raise ConfigError(_refusal(path, f"a pickle ({name}) that wants {wanted}")) from error


def _problems(data: Any, key: str = "") -> Iterator[str]:
    """Walk a serialised graph; yield what is neither an operator of PyTorch nor plain names and numbers."""
    if isinstance(data, dict):
        for name, value in data.items():
            if name in _FREE_TEXT:
                continue
            if not _PLAIN.fullmatch(name):
                yield f"the name {name!r}"
            yield from _problems(value, name)
    elif isinstance(data, list):
        for value in data:
            yield from _problems(value, key)
    elif isinstance(data, str):
        yield from _problem_of(data, key)


def _problem_of(text: str, key: str) -> Iterator[str]:
    if key == "target":
        if not _is_operator(text):
            yield f"a call of {text!r}"
    elif key == "expr_str":
        if not _is_expression(text):
            yield f"the expression {text[:80]!r}"
    elif key == "guards_code":
        if not _is_guard(text):
            yield f"the guard {text[:80]!r}"
    elif key in ("in_spec", "out_spec") or text.startswith("[1, {"):
        if not _is_tree(text):
            yield f"the structure {text[:80]!r}"
    elif not _PLAIN.fullmatch(text):
        yield f"the name {text[:80]!r}"


def _is_operator(target: str) -> bool:
    parts = target.split(".")
    if parts[0] == "_operator":
        return len(parts) == 2 and _OPERATORS.fullmatch(parts[1]) is not None
    if parts[0] == "math" or (parts[0] == "torch" and len(parts) == 2 and parts[1].startswith("sym_")):
        return len(parts) == 2 and parts[1].isidentifier()
    if parts[:2] != ["torch", "ops"] or not all(part.isidentifier() for part in parts):
        return False
    if parts[2] == "higher_order":
        return len(parts) == 4 and parts[3] in _HIGHER_ORDER
    if parts[2] not in ("aten", "prims", "torchvision") or parts[3] in _UNSAFE_ATEN or len(parts) != 5:
        return False
    found: Any = torch
    for part in parts[1:]:
        found = getattr(found, part, None)
    return found is None or isinstance(found, torch._ops.OpOverload)


def _is_expression(text: str) -> bool:
    """Sympy evaluates these: allow numbers, size symbols and calls of the functions that PyTorch writes."""
    tree = _parsed(text)
    return tree is not None and all(_in_expression(node) for node in ast.walk(tree))


def _in_expression(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return _EXPRESSION_NAMES.fullmatch(node.id) is not None or _SYMBOL.fullmatch(node.id) is not None
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and _EXPRESSION_NAMES.fullmatch(node.func.id) is not None
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float)) or _SYMBOL.fullmatch(str(node.value)) is not None
    return isinstance(node, (*_ARITHMETIC, ast.keyword, ast.Tuple))


def _is_guard(text: str) -> bool:
    """PyTorch compiles these to Python: allow comparisons of `L['name'].size()[n]`, numbers and arithmetic."""
    tree = _parsed(text)
    return tree is not None and all(_in_guard(node) for node in ast.walk(tree))


def _in_guard(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id in ("L", "torch", "math", "min", "max", "Min", "Max")
    if isinstance(node, ast.Attribute):
        return node.attr in _GUARD_ATTRIBUTES
    if isinstance(node, ast.Call):
        return not node.keywords
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float)) or _PLAIN.fullmatch(str(node.value)) is not None
    return isinstance(node, (*_ARITHMETIC, ast.Subscript))


_GUARD_ATTRIBUTES = frozenset(("size", "stride", "storage_offset", "sym_max", "sym_min", "sym_not", "floor", "ceil"))
_ARITHMETIC = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context),
)


def _parsed(text: str) -> ast.Expression | None:
    try:
        return ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _is_tree(text: str) -> bool:
    """Allow argument structures of plain containers only: other types make PyTorch import modules by name."""

    def plain(node: Any) -> bool:
        if not isinstance(node, dict) or node.get("type") not in _TREE_TYPES:
            return False
        context = node.get("context")
        names = context if isinstance(context, str) else json.dumps(context)
        return re.fullmatch(r'[\w\s\[\]",.\-]*', names) is not None and all(
            plain(c) for c in node.get("children_spec", ())
        )

    try:
        protocol, root = json.loads(text)
    except (ValueError, TypeError):
        return False
    return isinstance(protocol, int) and plain(root)
