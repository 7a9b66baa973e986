"""A student and held-out rows -> the answers that it gets right."""
