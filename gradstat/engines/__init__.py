"""The engines: each offers ``measure(tensors, bins, low, high) -> Statistics``.

`reference` defines every number; `cpu` and `gpu` compute the same, faster.
"""

ENGINE_VARIABLE = "GRADSTAT_ENGINE"  # of the environment: which one is used
