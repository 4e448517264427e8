"""Turn a PyTorch module, or an ONNX file, into the FP32 ONNX graph that every later stage works on."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes import common as passes
from torch import nn

from rdeploy import serde
from rdeploy.errors import InvariantError, RdeployError, StageError, Unsupported
from rdeploy.graph import opsets, restore, simplify, spatial
from rdeploy.metrics import detection
from rdeploy.types import ModelSpec, OnnxModel, Size, TensorInfo, format_size

INPUT, OUTPUT, BATCH = "input", "output", "batch"
LARGEST_BYTES = 2_000_000_000
"""ONNX keeps at most 2 GB in one file. A model is a single file here: nothing that copies or hashes it can lose its weights."""


def export(
    module: nn.Module, spec: ModelSpec, resolution: Size, path: Path, *, opset: int = 18, dynamic_batch: bool = False
) -> OnnxModel:
    """Write `module` at `resolution` (h, w) as an FP32 ONNX graph with one input `input`, (N, C, h, w).

    Constants and BatchNorm are folded, LayerNormalization is one operator, there are no operators outside ONNX's own.

    Raises:
        StageError: PyTorch's exporter cannot trace this module; the message is the exporter's own cause.
        Unsupported: an operator has no form at `opset`.
    """
    example = torch.zeros(2 if dynamic_batch else 1, spec.channels, *resolution)
    model = _exported(module, example, dynamic_batch=dynamic_batch, opset=max(opset, opsets.EXPORTER_OPSET))
    _name_outputs(model.graph, getattr(module, "output_names", ()))
    simplify.simplify(model, opset=opset)
    return _write(model, path)


def _name_outputs(graph: ir.Graph, names: Sequence[str]) -> None:
    """Call the outputs by the keys of the network's dictionary where there are several, or output, output1, ..."""
    count = len(graph.outputs)
    if count == 1 or len(names) != count:
        names = [OUTPUT, *(f"{OUTPUT}{index}" for index in range(1, count))]
    taken = {value.name for node in graph for value in node.outputs} | set(graph.initializers)
    for value, name in zip(graph.outputs, names):
        value.name = name if name == value.name or name not in taken else f"{name}_"


def save_program(module: nn.Module, spec: ModelSpec, resolution: Size, path: Path, *, dynamic_batch: bool) -> None:
    """Write `module` as a program of PyTorch's own (`.pt2`), with the inputs and outputs that `export` names.

    Raises:
        StageError: PyTorch cannot trace this module.
    """
    _save(module, torch.zeros(2 if dynamic_batch else 1, spec.channels, *resolution), path, dynamic_batch=dynamic_batch)


def embed_program(program: Path, spec: ModelSpec, resolution: Size, path: Path, *, dynamic_batch: bool) -> None:
    """Write a program that `save_program` wrote, of images of `resolution`, with the preprocessing of `spec` in front of it.

    Raises:
        StageError: PyTorch cannot trace it.
    """
    from rdeploy.graph.preprocessed import Preprocessed

    module = torch.export.load(str(program)).module()
    inside = Preprocessed(module, spec.native_resolution, resolution, spec.preprocessing)
    example = torch.zeros(2 if dynamic_batch else 1, *spec.native_resolution, spec.channels, dtype=torch.uint8)
    _save(inside, example, path, dynamic_batch=dynamic_batch)


def _save(module: nn.Module, example: torch.Tensor, path: Path, *, dynamic_batch: bool) -> None:
    shapes = ({0: torch.export.Dim(BATCH, min=1, max=4096)},) if dynamic_batch else None
    with _quiet():
        try:
            with torch.no_grad():
                program = torch.export.export(module, (example,), dynamic_shapes=shapes)
            torch.export.save(program, str(path))
        except Exception as error:
            raise _stopped(error) from error


def prepare(source: Path, resolution: Size, path: Path, *, opset: int = 18, dynamic_batch: bool = False) -> OnnxModel:
    """Write an ONNX file's graph, at `resolution`, in the same form as `export` does.

    Raises:
        Unsupported: the graph was made for another size and is tied to it, uses custom operators, or is too large.
    """
    model = ir.load(source)
    _check_size(model)
    model = ir.external_data.load_to_model(model)  # PyTorch's exporter puts weights beside the file
    passes.RemoveInitializersFromInputsPass()(model)  # where files of ONNX's early versions list them
    given = _image_shape(model, source)
    fixed = [size if isinstance(size, int) else wanted for size, wanted in zip(given[2:], resolution)]
    batch: int | str = BATCH if dynamic_batch else 1
    simplify.check_operators(model)
    simplify.simplify(model, opset=opset, input_shape=(batch, given[1] if isinstance(given[1], int) else 3, *fixed))
    if tuple(fixed) != resolution:
        try:
            spatial.resize(model, resolution)
        except Unsupported as error:
            size = format_size((fixed[0], fixed[1]))
            raise Unsupported(f"{source.name} has a fixed input of {size}: {error}") from error
    return _write(model, path)


def _image_shape(model: ir.Model, source: Path) -> list[Any]:
    """Return the shape (N, C, H, W) of the graph's one input; None or a name stands for a dynamic dimension."""
    shapes = {
        value.name: None if value.shape is None else [d if isinstance(d, int) else d.value for d in value.shape]
        for value in model.graph.inputs
    }
    found = [shape for shape in shapes.values() if shape is not None and len(shape) == 4]
    if len(shapes) != 1 or not found:
        said = [f"{name} ({', '.join(str(d or '?') for d in shape or ['?'])})" for name, shape in shapes.items()]
        raise Unsupported(f"{source.name}: expected one image input (N, C, H, W), found {', '.join(said) or 'none'}")
    return found[0]


def _exported(module: nn.Module, example: torch.Tensor, *, dynamic_batch: bool, opset: int) -> ir.Model:
    """Run PyTorch's exporter; a TorchScript module can only take its older, tracing one."""
    scripted = isinstance(module, torch.jit.ScriptModule)
    options: dict[str, Any] = {"input_names": [INPUT], "opset_version": opset}
    with _quiet() as said:
        try:
            if scripted:
                return _exported_by_tracing(module, example, dynamic_batch=dynamic_batch, options=options)
            if dynamic_batch:
                options["dynamic_shapes"] = ({0: torch.export.Dim(BATCH, min=1, max=4096)},)
            with torch.no_grad():
                program = torch.onnx.export(module, (example,), dynamo=True, verbose=False, **options)
        except Exception as error:
            plain = _without_fused_attention(module)
            if plain is None:
                raise _stopped(error) from error
            return _exported(plain, example, dynamic_batch=dynamic_batch, opset=opset)
    del said
    if program is None:
        raise StageError("export", "PyTorch's exporter returned nothing")
    return program.model


def _without_fused_attention(module: nn.Module) -> nn.Module | None:
    """Return a copy whose attention is written out, or None where there is none to write out.

    PyTorch's exporter knows fused attention of 4 dimensions only; timm's Hiera has 5. Both forms compute the same.
    """
    if not any(getattr(part, "fused_attn", False) is True for part in module.modules()):
        return None
    plain = copy.deepcopy(module)
    for part in plain.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    return plain


def _exported_by_tracing(
    module: nn.Module, example: torch.Tensor, *, dynamic_batch: bool, options: dict[str, Any]
) -> ir.Model:
    import onnx

    buffer = io.BytesIO()
    with torch.no_grad():
        options["output_names"] = [f"{OUTPUT}{index}" for index in range(len(_tensors(module(example))))]
    if dynamic_batch:
        options["dynamic_axes"] = {name: {0: BATCH} for name in (INPUT, *options["output_names"])}
    torch.onnx.export(module, (example,), buffer, dynamo=False, **options)
    return ir.from_proto(onnx.load_from_string(buffer.getvalue()))


_LOUD = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch.fx.experimental.symbolic_shapes")


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """Keep the exporter's progress and warnings off the user's terminal; its errors come as exceptions."""
    said = io.StringIO()
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield said
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _stopped(error: BaseException) -> RdeployError:
    """Return what the innermost error says: its first line names the operator or the expression."""
    while error.__cause__ is not None:
        error = error.__cause__
    if "DataDependent" in type(error).__name__:
        return Unsupported(
            f"it decides by the values of the image{_place_in_code(str(error))}, and an engine computes the same for every "
            "image: write it without the decision (torch.where, a mask), or leave it outside of the network",
            stage="export",
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = f"PyTorch's exporter stopped: {type(error).__name__}: {lines[0] if lines else 'no message'}"
    return StageError("export", said[:600])


def _place_in_code(text: str) -> str:
    """Return where the exporter was in the user's code, where it says so."""
    found = re.findall(
        r'File "([^"]+)", line (\d+), in .*\n\s*(.+)', text.partition("The following call raised this error")[2]
    )
    if not found:
        return ""
    file, line, code = found[-1]
    return f" ({Path(file).name}:{line}: {code.strip()[:100]})"


def _write(model: ir.Model, path: Path) -> OnnxModel:
    _check_size(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, path)
    return describe(path, precision="fp32")


def _check_size(model: ir.Model) -> None:
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if weights > LARGEST_BYTES:
        raise Unsupported(
            f"the weights take {weights / 1e9:.1f} GB in FP32; an ONNX file holds at most {LARGEST_BYTES / 1e9:.0f} GB, "
            "and rdeploy keeps a model in one file: take a smaller member of the family"
        )


def restore_size(path: Path, like: OnnxModel) -> tuple[str, ...]:
    """Let the dense outputs of the graph at `path` have the sizes of those of the native one; return which changed."""
    model = ir.load(path)
    sizes = [(info.shape[2], info.shape[3]) if len(info.shape) == 4 else None for info in like.outputs]
    changed = restore.restore_size(model, sizes)
    if changed:
        simplify.drop_unused_initializers(model.graph)
        _write(model, path)
    return changed


def restore_boxes(path: Path, native: Size, resolution: Size, *, inside: Sequence[str] = ()) -> None:
    """Let a detector's boxes be in pixels of the native size (h, w); relative ones stay.

    Args:
        inside: the places inside the network where its maps became smaller.

    Raises:
        Unsupported: the outputs are no detector's that rdeploy knows, or nobody knows what their boxes count in.
    """
    model = ir.load(path)
    outputs = describe(path, precision="fp32").outputs
    place = detection.box_axes([info.shape for info in outputs], [info.name for info in outputs])
    if place is None:
        return
    if inside:
        raise Unsupported(
            f"a detector's boxes in pixels count the cells of its maps, and {inside[0]} changes these: whether its boxes "
            "would still be in pixels of the image depends on its code; reduce it at its input"
        )
    if native == resolution:
        return
    restore.scale_boxes(model, *place, factors=(native[0] / resolution[0], native[1] / resolution[1]))
    _write(model, path)


def describe(path: Path, *, precision: str) -> OnnxModel:
    """Return what an ONNX file is: its hash, opset, inputs and outputs."""
    model = ir.load(path)
    return OnnxModel(
        path=str(path),
        sha256=serde.file_sha256(path),
        precision=precision,
        opset=opsets.opset_of(model),
        inputs=tuple(_info(value) for value in model.graph.inputs),
        outputs=tuple(_info(value) for value in model.graph.outputs),
    )


def _info(value: ir.Value) -> TensorInfo:
    shape = tuple(d if isinstance(d, int) else -1 for d in value.shape) if value.shape is not None else ()
    dtype = value.dtype.numpy().name if value.dtype is not None else "float32"
    return TensorInfo(name=value.name or "", dtype=dtype, shape=shape)


def check_graph(model: OnnxModel) -> None:
    """Check what the next stages rely on: a valid graph, one input, an output of known type.

    Raises:
        InvariantError: it does not hold.
        Unsupported: the shape of an output depends on the image.
    """
    import onnx

    try:
        onnx.checker.check_model(model.path)
    except onnx.checker.ValidationError as error:
        raise InvariantError(f"export: the graph is not valid ONNX: {str(error).splitlines()[0]}") from error
    if len(model.inputs) != 1 or not model.outputs:
        raise InvariantError(
            f"export: expected one input and an output, found {len(model.inputs)} and {len(model.outputs)}"
        )
    open_ended = [value.name for value in model.outputs if -1 in value.shape[1:]]
    if open_ended and (chooser := _first_chooser(Path(model.path))):
        raise Unsupported(
            f"the shape of the output {', '.join(open_ended)} depends on the image, by the operator {chooser}: an engine "
            "has outputs of one shape; return scores for everything and choose outside of the network"
        )


_CHOOSERS = ("NonZero", "NonMaxSuppression", "Unique", "Compress")
"""Operators that return as many rows as the image has of something."""


def _first_chooser(path: Path) -> str | None:
    return next((node.op_type for node in ir.load(path).graph if node.op_type in _CHOOSERS), None)


def torch_outputs(module: nn.Module, images: Sequence[NDArray[np.float32]]) -> tuple[NDArray[np.float32], ...]:
    """Run the module on images (1, C, H, W) and return its outputs, a row an image: what the graph is compared with."""
    with torch.inference_mode():
        rows = [_tensors(module(torch.from_numpy(np.ascontiguousarray(image)))) for image in images]
    return tuple(np.concatenate([row[index].float().numpy() for row in rows]) for index in range(len(rows[0])))


def _tensors(output: Any) -> tuple[torch.Tensor, ...]:
    """Return the tensors of whatever a module returns, in the order in which the exporter lists them."""
    if isinstance(output, dict):
        output = tuple(output.values())
    return tuple(t for part in output for t in _tensors(part)) if isinstance(output, (tuple, list)) else (output,)


def check_parity(exact: NDArray[np.float32], exported: NDArray[np.float32], *, tolerance: float = 1e-3) -> float:
    """Return the largest error of the exported graph against PyTorch, relative to the largest output.

    Raises:
        StageError: it is above `tolerance`: the graph does not compute what the module does.
    """
    if exact.shape != exported.shape:
        raise StageError("export", f"the graph returns {exported.shape}, the PyTorch model {exact.shape}")
    scale = float(np.abs(exact).max()) or 1.0
    worst = float(np.abs(exact - exported).max()) / scale
    if not worst <= tolerance:
        raise StageError(
            "export", f"the graph differs from the PyTorch model by {worst:.2%} of its largest output on real images"
        )
    return worst
