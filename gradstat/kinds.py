"""The kinds of tensors that a record may have rows of, and the names of those rows."""

from __future__ import annotations

GRAD, PARAM, UPDATE = "grad", "param", "update"
ACTIVATION, UNIT, GRAD_OUTPUT = "activation", "unit", "grad_output"

# In the order of a record's rows.
KINDS = (GRAD, PARAM, UPDATE, ACTIVATION, UNIT, GRAD_OUTPUT)

# What a parameter has, and what a module's output has.
OF_PARAMETERS = (GRAD, PARAM, UPDATE)
OF_OUTPUTS = (ACTIVATION, UNIT, GRAD_OUTPUT)

# What a value of each kind is called.
NOUNS = {
    GRAD: "gradient",
    PARAM: "parameter",
    UPDATE: "update",
    ACTIVATION: "activation",
    UNIT: "unit peak",
    GRAD_OUTPUT: "output gradient",
}

# What is multiplied by the scale of a loss.
SCALED = (GRAD, GRAD_OUTPUT)


def row_name(kind: str, name: str) -> str:
    """Name of a row: of a gradient its parameter's, otherwise with the kind before it."""
    return name if kind == GRAD else f"{kind}/{name}"


def plain_name(kind: str, row: str) -> str:
    """Name of the parameter or module that a row is of."""
    return row if kind == GRAD else row.removeprefix(f"{kind}/")
