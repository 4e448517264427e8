"""Gradient: the range with the least error at the network's output, each value weighed by how much the output minds it.

The search is that of `mse`. What differs is the histogram: a value counts by the square of the output's gradient there
(`quantize/gradients.py`; the diagonal of a Gauss-Newton Hessian, as PTQ4ViT weighs its ranges). Where no gradient can be had
(no torch, an operator without one) values count by their channels, and this is `mse`.
"""

from __future__ import annotations

from rdeploy.quantize.calibrators.mse import Options, find_range

__all__ = ["Options", "find_range"]
