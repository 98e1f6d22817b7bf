"""Replace a callable of a host module and capture its tensors; independent of model families and methods."""
