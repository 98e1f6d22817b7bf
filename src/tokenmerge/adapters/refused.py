"""Model families that token merging does not fit, with the reason: `find` raises it instead of "no adapter"."""

from __future__ import annotations

from torch import nn

from tokenmerge.adapters.base import class_names

__all__ = ["REFUSED", "refusal", "refused_part"]

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

_POST_NORM = (
    "its blocks are post-norm: each sum is normalised, so that no residual stream passes between attention and MLP, "
    "where tokens are merged. Its variants with do_stable_layer_norm=True are pre-norm, and those of wav2vec 2.0, "
    "HuBERT, UniSpeech and UniSpeech-SAT are supported"
)
_PLAIN_POST_NORM = (
    "its blocks are post-norm: each sum is normalised, so that no residual stream passes between attention and MLP, "
    "where tokens are merged"
)
_CONFORMER = (
    "its blocks convolve over neighbouring frames beside the attention (Conformer): with frames merged, neighbours are "
    "no longer next to each other, and a merged frame counts once in the convolution"
)
_STREAMING = (
    "each frame attends to a window of the frames before it (causal attention, for streaming): which those are is "
    "computed from places, and a frame merged into a later one would be heard too late"
)
_CHUNKS = (
    "its encoder cuts a sound into chunks that stand in one sequence, the last one shorter than the others: each chunk "
    "would have to be merged by itself, and chunks of different lengths leave different numbers of frames"
)
_DETR = (
    "its encoder adds the positions of a feature map to the queries and keys of every layer, or samples the map at "
    "points, and its decoder finds objects by place on the map: tokens must stand at every place"
)
_QUERIES = (
    "queries for masks join the patches in its last blocks, and in training each attends to the patches inside its own "
    "mask: both are told apart by place, and a merged patch would be inside and outside of a mask"
)
_NO_ENCODER = (
    "it has no encoder for images or sound: pieces of them enter its language model directly, among the words, in "
    "causal order. tokenmerge.vlm.patch(model, keep=...) is for language models, in the families that it names"
)
_TEXT_TOO = (
    "text and patches go through its blocks as one sequence, with positions of both in every attention: patches cannot "
    "be merged among themselves alone"
)
_TWO_IMAGES = (
    "its tokens are keypoints or places of two images, which attend to themselves and to each other in turn, and its "
    "answer is which of them match: every one must be there at the end"
)
_DETR_WINDOWS = (
    "most blocks of its image encoder attend inside windows of the full grid, and a detector reads the feature maps of "
    "several blocks: with tokens merged there is not one at every place of a window"
)
_WINDOWS_OF_TOWERS = (
    "most blocks of its vision tower attend inside windows of the full grid, of other sizes at its edges; with tokens "
    "merged there is not one at every place of a window"
)
_CODEC = (
    "it turns sound into codes and back by convolutions, one code for each step of time: a step that is merged away "
    "has no code"
)

_QWEN_WINDOWS = (
    "most blocks of its vision tower attend inside windows of the full grid, of other sizes at its edges; with tokens "
    "merged there is not one at every place of a window, and one token would stand in several windows. Qwen2-VL and "
    "Qwen3-VL have none"
)
_QWEN_KEEP = (
    f"{_QWEN_WINDOWS}. tokenmerge.vlm.patch(model, keep=0.25), without r, gives its language model fewer tokens"
)
_CODEBOOK = (
    "its images become numbers of a codebook, one at every place of a map, by convolutions with attention between "
    "them; merged tokens are no map"
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
    **dict.fromkeys(("RfDetrDinov2", "LwDetrViT"), _DETR_WINDOWS),
    **dict.fromkeys(("GotOcr2Vision", "DeepseekOcr2SamVision", "UnlimitedOcrSamVision", "SLANeXtVision"), _SAM),
    "PPFormulaNetVision": _SAM,
    "Exaone4_5_Vision": _WINDOWS_OF_TOWERS,
    **dict.fromkeys(
        ("Wav2Vec2Encoder", "HubertEncoder", "UniSpeechEncoder", "UniSpeechSatEncoder", "Data2VecAudioEncoder"),
        _POST_NORM,
    ),
    **dict.fromkeys(("SEWEncoder", "SpeechT5Encoder"), _PLAIN_POST_NORM),
    "SEWDTransformer": f"{_PLAIN_POST_NORM}; its attention is disentangled (DeBERTa), with a score for distances, too",
    "WavLMEncoder": "its attention adds a bias by distance that every block weighs anew, from the frames themselves "
    "(gated relative positions): it is a square over all frames, computed inside the attention",
    **dict.fromkeys(
        (
            *("ParakeetEncoder", "LasrEncoder", "GraniteSpeechCTC", "GraniteSpeechPlusCTC", "GraniteSpeech5Encoder"),
            *("NemotronAsrStreaming", "SeamlessM4TConformer", "SeamlessM4Tv2Conformer", "Wav2Vec2Bert"),
            *("Wav2Vec2Conformer", "Gemma3nAudio", "Gemma4Audio"),
        ),
        _CONFORMER,
    ),
    "FunAsrNanoEncoder": "every attention adds a convolution over neighbouring frames to its answer (a memory block): "
    "with frames merged, neighbours are no longer next to each other",
    **dict.fromkeys(("VoxtralRealtime", "MoonshineStreaming", "MimiTransformer", "PocketTTSAudio"), _STREAMING),
    **dict.fromkeys(("Qwen2_5OmniAudio", "Qwen3OmniMoeAudio", "Qwen3ASREncoder"), _CHUNKS),
    **dict.fromkeys(
        (
            *(
                "Detr",
                "ConditionalDetr",
                "DabDetr",
                "DeformableDetr",
                "TableTransformer",
                "RTDetr",
                "RTDetrV2",
                "DFine",
            ),
            *("Deimv2", "PPDocLayoutV2", "PPDocLayoutV3", "PPDocLayoutV4", "OmDetTurbo", "LwDetr", "RfDetr"),
        ),
        _DETR,
    ),
    **dict.fromkeys(("Eomt", "EomtDinov3", "Videomt"), _QUERIES),
    **dict.fromkeys(
        ("Fuyu", "Gemma4Unified", "DiffusionGemma", "EmbeddingGemma2", "NeoMME", "Inkling", "Cosmos3Omni"), _NO_ENCODER
    ),
    **dict.fromkeys(("LayoutLMv3", "Udop", "Tvp"), _TEXT_TOO),
    **dict.fromkeys(("LightGlue", "SuperGlue", "EfficientLoFTR"), _TWO_IMAGES),
    **dict.fromkeys(
        (
            *("Encodec", "Dac", "Xcodec", "Xcodec2", "NeuCodec", "WavTokenizer", "VibeVoiceAcousticTokenizer"),
            *("Musicgen", "MusicgenMelody"),
        ),
        _CODEC,
    ),
    "Perceiver": "its blocks work on a fixed number of latents that read the input by cross-attention: no block has "
    "one token for each patch",
    "GroupViT": "its stages group patches into segments by themselves and hand out which patch belongs to which: "
    "patches that are merged before would have no group of their own",
    "XCLIPVision": "frames of a clip stand behind each other in the batch, and every block lets one message token of "
    "each frame attend to those of the others, by their number",
    "SegGpt": "an image and its prompt go through the first blocks as one tall image each, are averaged after a fixed "
    "block and read by place, with relative positions by row and column",
    **dict.fromkeys(("Chameleon", "JanusVQVAE"), _CODEBOOK),
    "SLANet": "its image encoder is convolutional, and its attention is in the decoder of tables, which has no patches",
    "SuperPoint": "it is convolutional: a point of interest is a place on its feature map, and it has no attention",
    "Align": "its image tower is convolutional (an EfficientNet): it has feature maps, and no tokens",
    "MobileNetV5": f"it is convolutional, with attention to keys that are pooled from its map: {_FEATURE_MAP}",
    **dict.fromkeys(("MuseSparkVision", "MuseGlimmerVision"), _WINDOWS_OF_TOWERS),
    "Phi4MultimodalVision": "its attention is causal where no mask is given (is_causal in transformers 5.24): a "
    "merged token would be hidden from the tokens before its place",
    "RegNet": "it is convolutional; what is called attention in it weighs channels, not tokens",
    "FeatureListNet": "it is timm's features_only wrapper, which runs a network stage by stage and hands out the "
    "feature map of each: tokens must stand at every place of every map",
}


def refused_part(model: nn.Module) -> tuple[str, str] | None:
    """Return the least deep part of the model that is refused, as its path and the reason, or None."""
    reasons: dict[type, str | None] = {}
    for path, part in sorted(model.named_modules(), key=lambda item: item[0].count(".")):
        kind = type(part)
        if kind not in reasons:
            reasons[kind] = refusal(part)
        reason = reasons[kind]
        if path and reason:
            return path, reason
    return None


def refusal(model: nn.Module) -> str | None:
    """Return the known reason why tokens cannot be merged in a model of this class, or None."""
    for path in class_names(model):
        name = path.rpartition(".")[2]
        for start, reason in REFUSED.items():
            # "Nest" does not match "NestedThing"
            if name.startswith(start) and not name[len(start) : len(start) + 1].islower():
                return reason
    return None
