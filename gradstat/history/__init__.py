"""The record of a run: `History`, its files, and the merging of ranks."""

from gradstat.history.history import FIELDS, History, check_history, first_rows

__all__ = ["FIELDS", "History", "check_history", "first_rows"]
