"""`write`: a History as one HTML page to look around in, without a network or a server."""

from gradstat.report.page import write

__all__ = ["write"]
