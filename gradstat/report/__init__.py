"""A History as one HTML page to look around in, or as a page that follows a run."""
