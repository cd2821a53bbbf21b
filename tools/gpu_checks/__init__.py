"""What `tools/gpu_check.py` runs: checks of the kernels and of the model on them, each against a float64 reference."""
