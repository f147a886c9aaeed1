"""Recording: hooks on a model that measure what they see, into a `History`."""
