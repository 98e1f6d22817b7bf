"""`tome.merge`: the matching and merging functions, which live in `tokenmerge.functional`."""

from tokenmerge.functional import *  # noqa: F403
from tokenmerge.functional import __all__ as __all__
