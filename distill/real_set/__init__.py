"""Hand-made questions on the pictures of an installed package."""
