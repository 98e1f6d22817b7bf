"""Drop-in surfaces of older packages: a script written for one runs after changing its import."""
