"""A MODEL as the user writes it goes in; its module (or ONNX file) and its `ModelSpec` come out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdeploy import serde
from rdeploy.build_request import LoadOptions
from rdeploy.errors import ConfigError, MissingDependency
from rdeploy.models import content
from rdeploy.types import ModelSpec

if TYPE_CHECKING:
    from torch import nn

_DECIDING = ("torch", "torchvision", "timm", "transformers", "onnx", "safetensors", "rdeploy")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model ready for the next stage: a module in eval mode that maps images to one tensor, or an ONNX file."""

    spec: ModelSpec
    module: nn.Module | None = None
    onnx: Path | None = None


def load(source: str, options: LoadOptions) -> Loaded:
    """Load `timm:NAME`, `torchvision:NAME`, `hf:NAME`, `package.module:factory` or a model file, told apart by content.

    Raises:
        ConfigError: the name, the file or an option is wrong; one line says how to fix it.
        MissingDependency: the package that this model needs is not installed.
        Unsupported: this is a kind of model that rdeploy cannot take.
    """
    kind = _kind(source, options)
    if kind == content.ONNX:
        return _load_onnx(Path(source), source, options)
    _require_torch()
    from rdeploy.models import network

    module, spec = network.finish(_network(source, kind, options), source, options)
    return Loaded(spec=spec, module=module)


def source_key(source: str, options: LoadOptions) -> str | None:
    """Return a sha256 over all that decides what `load` returns, without importing torch; None where nobody can know.

    A factory's code and weights can be anything, and so can the classes behind a trusted pickle.

    Raises:
        ConfigError: the source is wrong, as `load` would find.
    """
    kind = _kind(source, options)
    if (
        content.is_factory(source)
        or (options.arch is not None and content.is_factory(options.arch))
        or options.trust_pickle
    ):
        return None
    return serde.digest(
        {
            "source": _named(source) if kind is None else _file_sha256(Path(source), kind),
            # The file's name decides a bundle's name, and which weights' transforms torchvision takes.
            "name": Path(source).name,
            "options": replace(options, offline=False),
            "versions": {package: _version(package) for package in _DECIDING},
        }
    )


def _kind(source: str, options: LoadOptions) -> str | None:
    """Return the file's kind, or None for a named architecture; refuse what can be refused without torch."""
    if not source:
        raise ConfigError(
            "no model was named: give timm:NAME, torchvision:NAME, hf:NAME, package.module:factory or a model file"
        )
    if _is_named(source):
        if options.arch is not None:
            raise ConfigError(f"{source} names its own architecture: drop --arch, or give a weights file instead")
        return None
    kind = content.kind_of(Path(source))
    if options.arch is not None and kind not in (content.CHECKPOINT, content.SAFETENSORS):
        raise ConfigError(f"{source} holds its own architecture: drop --arch")
    if options.random_init:
        raise ConfigError(f"--random-init and the weights file {source} exclude each other: drop one")
    return kind


def _is_named(source: str) -> bool:
    return source.startswith(("timm:", "torchvision:", "hf:")) or content.is_factory(source)


def _named(source: str) -> list[str]:
    """Return what a name stands for: itself, and for a local folder of transformers what is in it."""
    folder = Path(source.removeprefix("hf:"))
    if not source.startswith("hf:") or not folder.is_dir():
        return [source]
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors"))
    return [source, *(f"{file.name} {serde.file_sha256(file)}" for file in files)]


def _network(source: str, kind: str | None, options: LoadOptions) -> Any:
    path = Path(source)
    if kind is None:
        from rdeploy.models import architecture

        return architecture.build(source, options, pretrained=not options.random_init)
    if kind == content.EXPORTED_PROGRAM:
        from rdeploy.models import exported_program

        return exported_program.load(path, trust_pickle=options.trust_pickle)
    if kind == content.TORCHSCRIPT:
        from rdeploy.models import torchscript

        return torchscript.load(path)
    from rdeploy.models import state_dict

    return state_dict.load(path, kind, options)


def _load_onnx(path: Path, source: str, options: LoadOptions) -> Loaded:
    from rdeploy.models import onnx, spec

    model = onnx.read(path)
    channels, size = onnx.input_of(path, model)
    if size is not None and options.native_resolution not in (None, size):
        raise ConfigError(f"{path} takes images of {size[0]}x{size[1]} only: drop --native-resolution")
    if size is None and options.native_resolution is None:
        raise ConfigError(f"{path} takes images of any size: say which it was trained at, with --native-resolution")
    task = onnx.task_of(model)
    facts = spec.Facts(native_resolution=size, channels=channels, assumed=() if task or options.task else ("task",))
    made = spec.make_spec(
        path.stem,
        facts,
        options,
        source=source,
        task=options.task or task or "classification",
        sha256=onnx.sha256(path, model),
    )
    return Loaded(spec=made, onnx=path)


def _file_sha256(path: Path, kind: str) -> str:
    if kind != content.ONNX:
        return serde.file_sha256(path)
    from rdeploy.models import onnx

    return onnx.sha256(path, onnx.read(path))


def _require_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            "loading this model needs PyTorch, which is not installed", install="pip install 'rdeploy[cpu]'"
        ) from error


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
