"""Count, time and simulate merging, and take the one tensor out of what a model answers."""
