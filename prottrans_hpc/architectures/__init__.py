"""One torch-free record an architecture: its sizes, what was published, and its arithmetic."""
