"""A small YAML file goes in, a mapping comes out, read strictly: no tags, no aliases, no key twice, no huge file."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from rdeploy.errors import ConfigError

_LARGEST_FILE_BYTES = 64 * 1024


def read(path: Path, *, what: str) -> Mapping[str, Any]:
    """Return the top-level mapping of a YAML file; `what` names in errors what the file should be.

    Raises:
        ConfigError: the file cannot be read, is too large, is not valid YAML, or is not a mapping of names.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the {what} {path}: {error.strerror}") from error
    if len(content) > _LARGEST_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {_LARGEST_FILE_BYTES // 1024} KiB, so not a {what}")
    try:
        found = yaml.load(content, Loader=_StrictLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark is not None else ""
        unreadable = "not UTF-8 text" if isinstance(error, yaml.reader.ReaderError) else "nested too deeply"
        problem = getattr(error, "problem", None) or unreadable
        raise ConfigError(f"{path}:{line} not valid YAML: {problem}") from error
    return mapping(found, where=str(path))


def mapping(value: Any, *, where: str) -> Mapping[str, Any]:
    """Return the value where it is a mapping of names; `where` says in the error which part of the file it is.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{where}: expected a mapping of names to values, found {type(value).__name__}")
    return value


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses aliases (a small file could name a huge value) and keys that come twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if (name := str(key.value)) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} comes twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)
