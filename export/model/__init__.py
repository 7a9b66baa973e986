"""The model as exporters see it: its sizes, its weights read one by one, its tokenizer."""
