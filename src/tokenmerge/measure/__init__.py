"""Measure merging: MACs, time, memory, accuracy, and a simulation of merging in the unpatched model."""
