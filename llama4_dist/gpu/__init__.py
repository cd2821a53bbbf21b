"""The same model on one CUDA device, in Triton: experts, attention and cache in one process, decode as a CUDA graph."""
