"""Teacher, student and data -> a distilled Hugging Face checkpoint."""
