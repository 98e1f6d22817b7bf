"""Training with merging: recipes, objectives, and a loop that can be interrupted and resumed."""

from tokenmerge.training.amount import Amount

__all__ = ["Amount"]
