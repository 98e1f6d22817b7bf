"""Training with merging: recipes, objectives, and a loop that can be interrupted and resumed."""

from tokenmerge.training.step_schedule import Amount

__all__ = ["Amount"]
