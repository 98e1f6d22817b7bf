"""`tome.merge`: the matching and merging functions, which live in `tokenmerge.functional`."""

from tokenmerge.functional import (
    bipartite_soft_matching,
    kth_bipartite_soft_matching,
    merge_source,
    merge_wavg,
    random_bipartite_soft_matching,
)

__all__ = [
    "bipartite_soft_matching",
    "kth_bipartite_soft_matching",
    "merge_source",
    "merge_wavg",
    "random_bipartite_soft_matching",
]
