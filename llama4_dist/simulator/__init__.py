"""Serves a load on a planned cluster in simulated time, by the engine's own scheduler and the planner's formulae."""
