"""What the command line does, as functions: built on the front door only."""
