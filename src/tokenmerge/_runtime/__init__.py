"""Code that runs inside a patched model."""
