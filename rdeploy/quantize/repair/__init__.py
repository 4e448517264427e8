"""Repairs: each makes an INT8 graph closer to its FP32 original without changing what the runtime executes; one module each.

A repair defines `apply(model, placement, ...) -> int`, which changes the FP32 graph in place before the Q/DQ pairs are written
and returns how many layers it changed; `recipe` keeps it where the network's output gets closer to FP32.
"""
