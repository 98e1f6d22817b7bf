"""Drop-in replacements for older packages: a script written for one runs after changing its import."""
