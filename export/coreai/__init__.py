"""Core AI: the modules of Core ML through coreai-torch."""
