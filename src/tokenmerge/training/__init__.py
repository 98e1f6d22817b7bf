"""Training with merging: recipes, data, objectives, and a loop that loses nothing."""

from tokenmerge.training.amount import Amount

__all__ = ["Amount"]
