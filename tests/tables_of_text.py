"""Tables that the commands print, read back."""


def rows(text: str) -> dict[str, list[str]]:
    """Cells of each line that starts with a layer's name, bars left out."""
    split = (line.split() for line in text.splitlines())
    return {
        cells[0]: [cell for cell in cells[1:] if "#" not in cell]
        for cells in split
        if cells and cells[0].endswith("weight")
    }
