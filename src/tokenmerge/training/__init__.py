"""Training with merging: recipes, objectives, and a loop that can be interrupted and resumed."""

from typing import TYPE_CHECKING

from tokenmerge._moved import moved_names
from tokenmerge.training.step_schedule import StepSchedule

__all__ = ["StepSchedule"]

if not TYPE_CHECKING:
    __getattr__ = moved_names(__name__)
