"""Writes checkpoints: synthetic ones, parts for one host, other shards and other layouts; never in place."""
