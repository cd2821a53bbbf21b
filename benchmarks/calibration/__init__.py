"""Real runs of small models, and how well the planner's formulae tell one from another."""
