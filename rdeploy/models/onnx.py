"""An `.onnx` file goes in; it is checked, and what it says of its input and output comes out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rdeploy.errors import ConfigError, MissingDependency, Unsupported
from rdeploy.serde import file_sha256
from rdeploy.types import Size


def read(path: Path) -> Any:
    """Return the ModelProto without its external data, after `onnx.checker` passed it with that data in place.

    Raises:
        MissingDependency: onnx is not installed.
        ConfigError: it is no valid model, or its external data is missing or outside its folder.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingDependency("onnx is not installed", install="pip install 'rdeploy[torch]'") from error
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise ConfigError(f"{path} is not an ONNX model, or is damaged or cut off") from error
    if not model.graph.node:
        raise ConfigError(f"{path} is not an ONNX model: it has no nodes")
    external_files(path, model)
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{path} is not a valid ONNX model: {text[:200]}") from error
    return model


def external_files(path: Path, model: Any) -> tuple[Path, ...]:
    """Return the files with the model's external tensors, sorted.

    Raises:
        ConfigError: one is missing, or not below the model's own folder (also through `..` or a link).
    """
    folder = path.parent.resolve()
    found = set()
    for location in {_location(tensor) for tensor in _tensors(model)} - {None}:
        file = (folder / str(location)).resolve()
        if not file.is_relative_to(folder):
            raise ConfigError(f"{path} reads tensors from {location}, outside its own folder: refused")
        if not file.is_file():
            raise ConfigError(f"{path} needs the file {location} beside it, which is not there")
        found.add(file)
    return tuple(sorted(found))


def sha256(path: Path, model: Any) -> str:
    """Return the sha256 of the file, or of it and its external data together."""
    files = external_files(path, model)
    if not files:
        return file_sha256(path)
    return hashlib.sha256("\n".join(file_sha256(file) for file in (path, *files)).encode()).hexdigest()


def input_of(path: Path, model: Any) -> tuple[int | None, Size | None]:
    """Return the channels and the size (h, w) of the only input, None where they are dynamic.

    Raises:
        Unsupported: the input is not one float tensor (N, C, H, W).
    """
    from onnx import TensorProto

    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise Unsupported(f"{path} has {len(inputs)} inputs: rdeploy takes models with one, the images")
    kind = inputs[0].type.tensor_type
    if kind.elem_type not in (TensorProto.FLOAT, TensorProto.FLOAT16):
        name = TensorProto.DataType.Name(kind.elem_type).lower()
        raise Unsupported(f"{path} takes {name} input: rdeploy takes floating-point images (N, C, H, W)")
    sides = [side.dim_value if side.HasField("dim_value") and side.dim_value > 0 else None for side in kind.shape.dim]
    if len(sides) != 4:
        raise Unsupported(f"{path} takes an input of {len(sides)} dimensions: rdeploy takes images (N, C, H, W)")
    if sides[1] not in (None, 1, 2, 3, 4) and sides[3] in (1, 3, 4):
        raise Unsupported(f"{path} takes (N, H, W, C) images: rdeploy takes (N, C, H, W); export it channels first")
    height, width = sides[2:]
    return sides[1], None if height is None or width is None else (height, width)


def task_of(model: Any) -> str | None:
    """Return the task that the first output's rank tells, or None."""
    output = model.graph.output[0].type.tensor_type
    if len(model.graph.output) != 1 or not output.HasField("shape"):
        return None
    return {2: "classification", 4: "segmentation"}.get(len(output.shape.dim))


def _tensors(model: Any) -> Iterator[Any]:
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        yield from _tensors_of(graph.node, graphs)
    for function in model.functions:
        yield from _tensors_of(function.node, graphs)


def _tensors_of(nodes: Any, graphs: list[Any]) -> Iterator[Any]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                graphs.append(attribute.g)
            graphs.extend(attribute.graphs)


def _location(tensor: Any) -> str | None:
    from onnx import TensorProto

    if tensor.data_location != TensorProto.EXTERNAL:
        return None
    return next((str(entry.value) for entry in tensor.external_data if entry.key == "location"), "")
