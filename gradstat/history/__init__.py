"""The record of a run: `History`, its files, and the merging of ranks."""

from gradstat.history.history import FIELDS, History

__all__ = ["FIELDS", "History"]
