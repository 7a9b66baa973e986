"""MobileVLM V2 as a transformers model, its published layout, and what a loss needs of any VLM."""

from distill.models.checkpoint import load_vlm

__all__ = ["load_vlm"]
