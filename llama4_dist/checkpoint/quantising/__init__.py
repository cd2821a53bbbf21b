"""Writes a quantised checkpoint from one in floats: shard by shard, in bounded memory, resumable."""
