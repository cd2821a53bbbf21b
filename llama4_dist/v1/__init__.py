"""Generated messages and services of the public API (protos/llama4_dist/v1)."""
