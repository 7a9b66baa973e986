"""ExecuTorch: graphs lowered one at a time and joined in one .pte."""
