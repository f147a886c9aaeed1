"""`ShownFigure`: a figure that a notebook shows, and that belongs to no window."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure


class ShownFigure(Figure):
    """A figure that a notebook shows when it is the last line of a cell.

    Nothing of pyplot is involved: it opens no window, and is gone with its last name.
    """

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()

    def show(self, warn: bool = True) -> None:
        """Show the figure in a notebook.

        Args:
            warn: unused; `Figure.show` has it.

        Raises:
            RuntimeError: this is no notebook.
        """
        display = _display()
        if display is None:
            raise RuntimeError(
                "show() needs a notebook: the figure belongs to no window; savefig(path) writes it"
            )
        display(self)


def _display() -> Any:  # noqa: ANN401 (IPython has types only where it is installed)
    """The function of IPython that shows an object; ``None`` outside of it."""
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        return None
    return display if get_ipython() is not None else None
