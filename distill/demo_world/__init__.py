"""A procedural world of coloured shapes and words: pictures, true questions, six benchmarks, a teacher's lessons."""
