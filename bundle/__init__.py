"""The contract every room shares: manifest, prompt, image, tokenizer, session, golden vectors, verdict; no torch."""
