"""Tell what a MODEL is: a name, or a file by its first bytes and its contents; nothing is unpickled or imported."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

from rdeploy.errors import ConfigError

ONNX, SAFETENSORS, EXPORTED_PROGRAM, TORCHSCRIPT, CHECKPOINT = "onnx", "safetensors", "pt2", "torchscript", "checkpoint"
"""`CHECKPOINT` is anything that `torch.save` wrote: a state dict, a dictionary around one, or a pickled module."""

_KNOWN = ".onnx, .pt, .pth, .safetensors or .pt2"


def is_factory(source: str) -> bool:
    """Return whether this is `package.module:factory`: code that can do and fetch anything."""
    if source.startswith(("timm:", "torchvision:", "hf:")) or Path(source).exists():
        return False
    module, colon, attribute = source.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *attribute.split(".")))


def kind_of(path: Path) -> str:
    """Return what the file holds, one of the constants of this module.

    Raises:
        ConfigError: there is no such file, or it is a folder, empty, cut off, or no model.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name a model file ({_KNOWN}) in it")
    if not path.exists():
        raise ConfigError(f"{path} does not exist")
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if not start:
        raise ConfigError(f"{path} is empty")
    if start.startswith(b"PK"):
        return _kind_of_archive(path)
    if start[0] == 0x80:
        return CHECKPOINT
    if path.suffix.lower() == ".onnx" or start[0] == 0x08:
        return ONNX
    if path.suffix.lower() == ".safetensors" or start[8:9] == b"{":
        _check_safetensors(path, start)
        return SAFETENSORS
    raise ConfigError(f"{path} is not a model: it starts with {start[:8]!r}, which is none of {_KNOWN}")


def _kind_of_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            # The first folder is the archive's own name; what follows says which of PyTorch's formats it is.
            names = {name.split("/", 1)[-1] for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError) as error:
        raise ConfigError(f"{path} is damaged or cut off: its archive's table of contents is missing") from error
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return EXPORTED_PROGRAM
    if "constants.pkl" in names and any(name.startswith("code/") for name in names):
        return TORCHSCRIPT
    if "data.pkl" in names:
        return CHECKPOINT
    raise ConfigError(f"{path} is a zip archive, but not one that PyTorch wrote")


def _check_safetensors(path: Path, start: bytes) -> None:
    """Check the header against the file's size: a file that was cut off has less data than its header names."""
    size = path.stat().st_size
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else size
    if length + 8 > size:
        raise ConfigError(f"{path} is damaged or cut off: its safetensors header is incomplete")
    with path.open("rb") as file:
        file.seek(8)
        text = file.read(length)
    try:
        header = json.loads(text)
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ConfigError(f"{path} is not a model: its safetensors header is not readable") from error
    if 8 + length + end != size:
        raise ConfigError(f"{path} is damaged or cut off: {size} bytes where its header names {8 + length + end}")
