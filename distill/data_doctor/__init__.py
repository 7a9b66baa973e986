"""A dry run over a data set: what is missing, corrupt, too long, mislabelled, copied or leaking from a benchmark."""
