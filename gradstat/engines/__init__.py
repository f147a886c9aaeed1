"""The engines: `reference` defines every number; `cpu` and `triton` compute the same, faster.

What each offers is in `protocol`. Those of narrow formats are in modules of their own:
`reference_formats`, `cpu.formats`, `triton_formats`.
"""

ENGINE_VARIABLE = "GRADSTAT_ENGINE"  # of the environment: which one is used
