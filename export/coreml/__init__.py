"""Core ML: programs converted hollow and filled with compressed weights."""
