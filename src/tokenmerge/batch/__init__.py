"""Many images through one model: the class that engines call, and a whole source written to a table."""
