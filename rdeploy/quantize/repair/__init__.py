"""Repairs: each makes an INT8 graph closer to its FP32 original without changing what the runtime executes; one module each.

A repair defines `Options` and `apply(model, plan, batches, options) -> None`, working on the FP32 graph before the Q/DQ
pairs are written.
"""
