"""Code that depends on private parts of torch."""
