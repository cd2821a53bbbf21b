"""Logs and traces of a process: how they are written, and what they carry; knows nothing of what it writes about."""
