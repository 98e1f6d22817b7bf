"""Samples: where they are read from, how they are prepared, and batches of them with labels."""
