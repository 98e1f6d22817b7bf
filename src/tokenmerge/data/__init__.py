"""Data: sources of samples, preprocessing, and labelled batches."""
