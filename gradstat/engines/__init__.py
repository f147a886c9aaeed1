"""The engines: each offers ``measure(tensors, bins, low, high) -> Statistics``.

`reference` defines every number; `cpu` and `gpu` compute the same, faster.
"""
