"""Families of research repositories."""
