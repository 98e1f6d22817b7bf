"""What runs inside a patched model."""
