"""The engines: each offers ``measure(tensors, bins) -> Statistics``.

`reference` defines every number; `cpu` and `triton` compute the same, faster. What each offers for
narrow formats, ``measure_formats(tensors, formats, dim)``, is in a module of its own:
`reference_formats`, `cpu.formats`, `triton_formats`.
"""

ENGINE_VARIABLE = "GRADSTAT_ENGINE"  # of the environment: which one is used
