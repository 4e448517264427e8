"""The options that say how MODEL becomes a network, shared by the verbs that load one."""

from __future__ import annotations

import ast
from typing import Any

import click


class _Numbers(click.ParamType):
    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in str(value).replace(" ", ",").split(",") if part)
        except ValueError:
            self.fail(f"{value!r} is no list of numbers; write one per channel, such as 0.485,0.456,0.406", param, ctx)


class _KeyValue(click.ParamType):
    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        key, equals, text = str(value).partition("=")
        if not equals or not key.isidentifier():
            self.fail(f"{value!r} is not of the form key=value, such as num_classes=10", param, ctx)
        try:
            return key, ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return key, {"true": True, "false": False, "none": None}.get(text.lower(), text)


OPTIONS = (
    click.option(
        "--arch",
        metavar="MODEL",
        help="The architecture of a state dict: timm:NAME, torchvision:NAME, hf:NAME, pkg.module:factory.",
    ),
    click.option(
        "--arch-kwargs", type=_KeyValue(), multiple=True, metavar="key=value", help="Arguments for it; repeatable."
    ),
    click.option("--random-init", is_flag=True, help="Do not load pretrained weights."),
    click.option(
        "--trust-pickle", is_flag=True, help="Allow a file to run code when it is opened. Only for files of your own."
    ),
    click.option("--offline", is_flag=True, help="Never download anything."),
    click.option("--task", help="classification, segmentation, detection or embedding."),
    click.option("--native-resolution", metavar="N|HxW", help="The size that the model was trained at."),
    click.option("--mean", type=_Numbers(), help="Per channel, in 0..1: 0.485,0.456,0.406."),
    click.option("--std", type=_Numbers(), help="Per channel, in 0..1: 0.229,0.224,0.225."),
    click.option("--interpolation", help="bilinear, bicubic, ..."),
    click.option("--crop-pct", type=float, help="Fraction of the resized side that the crop keeps."),
    click.option("--crop-mode", help="center: keep the proportions and cut; squash: see the whole image."),
)
