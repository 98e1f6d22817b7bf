"""Small random models in the form of hosts that cannot be installed, or that have to be tried without them."""
