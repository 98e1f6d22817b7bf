"""Choose method and schedule for the model in front of us."""
