"""Rows of a data set -> encoded conversations -> the batches that training and recording read."""
