"""Small random models in the form of hosts that cannot be installed, or that have to be tried without them.

Nothing here knows the library: what a model is does not depend on what is done to it.
"""
