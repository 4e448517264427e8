"""Read an attribute of a node: a node and a name go in, the value or the operator's default comes out."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """Return the attribute's value; `default` where the node does not have it."""
    return node.attributes[name].value if name in node.attributes else default
