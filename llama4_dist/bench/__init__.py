"""Measures how fast a gateway, an engine, dispatch and a start are; the arithmetic of figures apart from the load."""
