"""The driver's half: starts and ends processes, on Ray. The only folder that knows it."""
