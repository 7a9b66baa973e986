"""What a teacher said, recorded once and read instead of running it."""
