"""Choose a method and a schedule for a given model."""
