"""The interface of the ToMe package: `from tokenmerge.compat import tome` instead of `import tome`.

`tome.patch.timm / swag / mae(model)`, then `model.r` and `model._tome_info`; `tome.merge`, `tome.utils`, `tome.vis`,
`tome.make_visualization`. The models are patched by `tokenmerge.patch`, so they keep their class and can be unpatched.
"""

from tokenmerge.compat.tome import merge, patch, utils, vis
from tokenmerge.compat.tome.vis import make_visualization

__all__ = ["make_visualization", "merge", "patch", "utils", "vis"]
