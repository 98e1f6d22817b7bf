"""Model families that token merging does not fit, with the reason: `find` raises it instead of "no adapter"."""

from __future__ import annotations

from torch import nn

from tokenmerge.adapters.base import class_names

__all__ = ["REFUSED", "refusal"]

_WINDOWS = (
    "its attention runs inside windows that partition the full grid, and its stages join neighbouring patches; with "
    "tokens merged there is not one at every place, so neither can be cut"
)
_MASK_UNITS = (
    "its tokens lie in mask units that attention and pooling cut by position; with tokens merged the units are of "
    "different sizes"
)
_REDUCED_KEYS = (
    "its keys and values are convolved and pooled over the full grid before the attention; merged tokens have no grid, "
    "and the keys no longer stand for one token each"
)
_FEATURE_MAP = (
    "its tokens are a two-dimensional feature map that convolutions work on beside or before the attention; merged "
    "tokens are no map"
)
_DIVIDED = (
    "each of its blocks attends over the frames of one place and then over the places of one frame: tokens must stand "
    "at every place of every frame"
)
_SAM = (
    "its image encoder attends inside windows of a full grid, with relative positions per row and column. timm's "
    "encoders of the same kind (samvit_*) are supported, merged inside windows for the attention only"
)
_NEIGHBOURS = "each query attends to a fixed neighbourhood on the full grid; merged tokens have no neighbours"
_NO_ATTENTION = (
    "it has no attention over tokens: they are mixed by pooling, modulation or a matrix of fixed size, where a merged "
    "token cannot count as the tokens it stands for"
)

_QWEN_WINDOWS = (
    "most blocks of its vision tower attend inside windows of the full grid, of other sizes at its edges; with tokens "
    "merged there is not one at every place of a window, and one token would stand in several windows. Qwen2-VL and "
    "Qwen3-VL have none"
)
_QWEN_KEEP = (
    f"{_QWEN_WINDOWS}. tokenmerge.vlm.patch(model, keep=0.25), without r, gives its language model fewer tokens"
)

# start of the class name -> reason; names differ between timm, transformers, torchvision and the authors' code
REFUSED = {
    "Swin": _WINDOWS,
    "Swinv2": _WINDOWS,
    "DonutSwin": _WINDOWS,
    "MaskFormerSwin": _WINDOWS,
    "ClapAudio": _WINDOWS,
    "GlobalContextVit": _WINDOWS,
    "Nest": _WINDOWS,
    "MaxVit": f"{_WINDOWS}; every block begins with a convolution, too",
    "MaxxVit": _FEATURE_MAP,
    "TinyVit": f"{_WINDOWS}; between attention and MLP there is a convolution, too",
    "Twins": "its blocks attend inside windows of the full grid or to keys that are pooled from it, and a convolution "
    "over the grid gives them positions; merged tokens have no grid",
    "DaVit": "every second block attends between channels, where no token has a key of its own, and the others inside "
    "windows of the full grid",
    "Florence2Vision": "it is a DaViT: every second block attends between channels, where no token has a key of its "
    "own, and the others inside windows of the full grid",
    "Xcit": "its attention is between channels, so that no token has a key or a score of its own, and its local patch "
    "interaction is a convolution that needs the full grid",
    "EdgeNeXt": "its attention is between channels, so that no token has a key or a score of its own, and its blocks "
    "are convolutions on a feature map",
    "Qwen2_5_VL": _QWEN_KEEP,
    "Qwen2_5_Vision": _QWEN_KEEP,
    "Qwen2_5OmniThinker": _QWEN_WINDOWS,
    "Qwen2_5OmniVision": _QWEN_WINDOWS,
    "Hiera": _MASK_UNITS,
    "Timesformer": _DIVIDED,
    "VideoPrism": "a first list of blocks sees the patches of one frame and a second one the frames of one place: "
    "tokens must stand at every place of every frame between the two",
    "Vilt": "text and patches go through its blocks as one sequence, and places of both are read from it: patches "
    "cannot be merged among themselves alone",
    "VitDet": f"its blocks cut a feature map into windows, with convolutions between them: {_FEATURE_MAP}",
    "Sam2": f"its image encoder is a Hiera: {_MASK_UNITS}",
    "Sam3": "most blocks of its image encoder attend inside windows, and in every block its tokens stand as a full "
    "grid, [B, rows, columns, C], that the windows are cut from; merged tokens are no grid",
    "Sam": _SAM,
    "ImageEncoderViT": _SAM,
    "MultiScaleVit": _REDUCED_KEYS,
    "MViT": _REDUCED_KEYS,
    "PyramidVisionTransformer": _REDUCED_KEYS,
    "Pvt": _REDUCED_KEYS,
    "Segformer": _REDUCED_KEYS,
    "GLPN": _REDUCED_KEYS,
    "Cvt": "its queries, keys and values are convolutions over the full grid; merged tokens have no grid",
    "Levit": "its attention adds a learned bias per distance on the full grid and its stages take every second row and "
    "column of it as queries; with tokens merged those rows and columns are not there",
    "PoolingVisionTransformer": "its stages pool patches by strided convolutions over the full grid; merged tokens "
    "have no grid",
    "ConVit": "its gated positional attention blends in a second softmax, over the distances of a full square grid "
    "that it derives from the number of tokens, and the class token joins half-way through the blocks",
    "CrossVit": "each of its blocks runs branches of different patch sizes at once, which then attend to each other: "
    "there is no one sequence of tokens to merge in",
    "TNT": "every block adds the pixel tokens inside a patch to its patch token: patches cannot be merged while their "
    "pixels go on apart",
    "CoaT": f"its attention is factorised, with no score per pair of tokens, and adds convolutional positions: "
    f"{_FEATURE_MAP}",
    "VOLO": "outlook attention reads the neighbours of each place on a two-dimensional map, and it comes first; merged "
    "tokens are no map",
    "EfficientFormer": _FEATURE_MAP,
    "EfficientVit": _FEATURE_MAP,
    "FastVit": _FEATURE_MAP,
    "MetaFormer": _FEATURE_MAP,
    "MobileViT": _FEATURE_MAP,
    "NextViT": _FEATURE_MAP,
    "SHViT": _FEATURE_MAP,
    "SwiftFormer": _FEATURE_MAP,
    "Visformer": _FEATURE_MAP,
    "Nat": _NEIGHBOURS,
    "Dinat": _NEIGHBOURS,
    "FocalNet": _NO_ATTENTION,
    "MlpMixer": _NO_ATTENTION,
    "PoolFormer": _NO_ATTENTION,
}


def refusal(model: nn.Module) -> str | None:
    """Return the known reason why tokens cannot be merged in a model of this class, or None."""
    for path in class_names(model):
        name = path.rpartition(".")[2]
        for start, reason in REFUSED.items():
            # "Nest" does not match "NestedThing"
            if name.startswith(start) and not name[len(start) : len(start) + 1].islower():
                return reason
    return None
