"""Bundles -> latency, memory and accuracy rows -> one offline report."""
