"""The model in Triton: on one CUDA device with cache and experts, decode as a CUDA graph; or a cluster's part of it."""
