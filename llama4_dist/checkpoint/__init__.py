"""Reads checkpoints: config.json, safetensors shards and their index, slice by slice from memory maps."""
