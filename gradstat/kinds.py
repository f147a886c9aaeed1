"""What a row of a record is of: the kinds of values, and `Row`."""

from __future__ import annotations

from typing import NamedTuple

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

# What backward computes, the last layer first.
FROM_THE_END = (GRAD, GRAD_OUTPUT)


class Row(NamedTuple):
    """What a row of a record is of.

    Args:
        kind: one of `KINDS`.
        name: of the parameter or module that has values of that kind.
    """

    kind: str
    name: str

    def __str__(self) -> str:
        """The row as it is printed: a gradient by its parameter's name, others after their kind."""
        return self.name if self.kind == GRAD else f"{self.kind}/{self.name}"

    @classmethod
    def printed(cls, kind: str, text: str) -> Row:
        """The row of a kind that is printed so."""
        return cls(kind, text if kind == GRAD else text.removeprefix(f"{kind}/"))
