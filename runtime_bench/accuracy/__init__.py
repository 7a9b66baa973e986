"""The six benchmarks: questions from their real files, official scoring of answer files."""
