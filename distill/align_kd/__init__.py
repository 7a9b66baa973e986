"""The trained module: student, teacher and adapters, and the loss terms of one batch."""
