"""Families of Hugging Face transformers."""
