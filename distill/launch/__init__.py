"""Configurations for accelerate launch: 1 GPU, 8 GPUs, 2 x 8 GPUs, and two processes on a CPU."""
