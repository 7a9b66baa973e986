"""Tensors of student and teacher -> scalar losses; no model is known here."""
