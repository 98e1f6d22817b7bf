"""Small random models with the structure of hosts that cannot be installed, or are tested without an installation.

Nothing here imports the library: the models are independent of what patching does to them.
"""
