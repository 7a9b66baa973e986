"""Flags and recipes -> frozen, checked settings; nothing here needs torch."""
