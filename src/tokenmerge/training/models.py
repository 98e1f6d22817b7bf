"""Build the model that a run trains: the bundled one, a ViT of given sizes for images or clips, a timm or a saved one.

Shapes: B batch, C channels, T frames, N tokens.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.data.classes import by_label
from tokenmerge.errors import ConfigError, DataError, UnsupportedError, unknown_name
from tokenmerge.files import describe_differences, is_file, read_tensors
from tokenmerge.measure.outputs import declared_classes, run_images
from tokenmerge.tools.hugging_face import is_folder
from tokenmerge.tools.models import BUNDLED, OF_TIMM, check_takes_images, import_timm, load_model
from tokenmerge.training.recipe import Model

__all__ = [
    "VIT",
    "TubeletEmbed",
    "build_model",
    "check_trust",
    "load_weights",
    "order_classes",
    "own_size",
    "position_embeddings",
]

VIT = "vit"
_log = logging.getLogger(__name__)


def build_model(model: Model, size: tuple[int, ...], classes: int, trust_pickle: bool = False) -> nn.Module:
    """Return a model for inputs of `size` with one logit per class, in train mode on the CPU.

    Args:
        model: the settings. `name` is `"reference"` (the bundled model); `"vit"`, timm's `VisionTransformer` with
            `model.options`, where `patch_size` is one number or two, or for clips three (frames, rows, columns); a timm
            name, adapted to `size` where timm can; a file that `torch.save(model)` wrote; or a folder that
            `save_pretrained` of a Hugging Face model wrote.
        size: of one input without the batch: (C, H, W) for images and spectrograms, (C, T, H, W) for clips.
        classes: how many. A model with another number of classes gets a new classifier, which is logged.
        trust_pickle: load a model that is a pickle.

    Raises `UnknownNameError` for a name or an option that does not exist, `ConfigError` for options that do not fit
    together, `DataError` if the model does not take this size or cannot be given another classifier.
    """
    net: Any
    check_trust(model, trust_pickle)
    if model.name == BUNDLED:
        net = _reference(model)
    elif model.name == VIT:
        net = _vit(model.options, size, classes)
    else:
        net = _named(model, size, classes, trust_pickle)
        if getattr(net, "pretrained_cfg", None):  # other commands read the input size from here
            net.pretrained_cfg = {**net.pretrained_cfg, "input_size": size}
    _fit_classes(net.eval(), model.name, size, classes)
    return net.train()  # type: ignore[no-any-return]


def check_trust(model: Model, trust_pickle: bool) -> None:
    """Raise `DataError` if building a model would load a pickle (which runs the code in it) without `trust_pickle`."""
    named = [f"model.options.{key}" for key in _FILES if key in model.options]
    if ":" not in model.name and is_file(model.name):
        named.append(f"model.name, {model.name},")
    if named and not trust_pickle:
        raise DataError(
            f"{named[0]} of the recipe names a file that is loaded as a pickle, which runs whatever code it holds. "
            "Where you trust who made it, say so: --trust-pickle on the command line, trust_pickle=True in Python."
        )


def own_size(name: str, kind: str) -> tuple[int, ...]:
    """Return the image size a Hugging Face folder was made for, (C, H, W); () for every other name."""
    path = Path(name.removeprefix("hf:")) / "config.json"
    if kind != "image" or not path.is_file():
        return ()
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        side = about["image_size"]
        return (about.get("num_channels", 3), *((side, side) if isinstance(side, int) else side))
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def order_classes(model: nn.Module, names: Sequence[str]) -> None:
    """Reorder the outputs of a Hugging Face classifier to match `names`, if these are its own labels in another order.

    Raises `DataError` if it has no linear layer called `classifier`, or if only some of the names are its labels.
    """
    config: Any = getattr(model, "config", None)
    order = by_label(model, names) if declared_classes(model) == len(names) else None
    if order is None or order == list(range(len(order))):
        return
    if len(set(order)) < len(order):
        raise DataError(f"two of the classes {', '.join(names)} are called as the same label of the model.")
    layer = getattr(model, "classifier", None)
    if not isinstance(layer, nn.Linear):
        raise DataError(
            "the model numbers the data's classes in another order, and has no linear layer `classifier` to reorder: "
            "name the class folders by the model's numbers, 0 to n - 1."
        )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter[order])
    config.label2id, config.id2label = {name: i for i, name in enumerate(names)}, dict(enumerate(names))


def load_weights(model: nn.Module, path: str | Path) -> str:
    """Load weights from a .safetensors file or the folder of a run; return a sentence that names what was not loaded.

    Only the classifier may differ, and the norm before it if the two models pool differently; these then keep their
    initial values. Raises `DataError`, and changes nothing, if anything else differs.
    """
    file = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    state, own = read_tensors(file), model.state_dict()
    fitting = {key for key, value in state.items() if key in own and own[key].shape == value.shape}
    different = describe_differences(state, own, free=_replaceable(model, state))
    if different:
        raise DataError(
            f"the weights in {file} are of another model: {different}. Build the model with the options, the size and "
            "the patches it was trained with."
        )
    model.load_state_dict({key: state[key] for key in fitting}, strict=False)
    new, unused = sorted(own.keys() - fitting), sorted(state.keys() - own.keys())
    parts = [f"{len(fitting)} of {len(own)} tensors from {file}"]
    parts += [f"new: {', '.join(new)}"] if new else []
    parts += [f"not used: {', '.join(unused)}"] if unused else []
    return "; ".join(parts) + "."


class TubeletEmbed(nn.Module):
    """Cut clips `[B, C, T, H, W]` into tubelets and project each to a token: `[B, N, width]`, time first, columns last.

    A timm `embed_layer`. `img_size`, `patch_size` and `grid_size` have three entries each: frames, rows, columns.
    """

    def __init__(
        self,
        img_size: Sequence[int],
        patch_size: Sequence[int],
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if dynamic_img_pad:
            raise ValueError("clips are not padded")
        self.img_size, self.patch_size = tuple(img_size), tuple(patch_size)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = math.prod(self.grid_size)
        patch: Any = self.patch_size
        self.proj = nn.Conv3d(in_chans, embed_dim, patch, patch, bias=bias, device=device, dtype=dtype)

    def feat_ratio(self, as_scalar: bool = True) -> Any:
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: Sequence[int]) -> tuple[int, ...]:
        """Return the number of tubelets along each axis for a clip of this size."""
        return tuple(length // step for length, step in zip(img_size, self.patch_size, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[2:]) != self.img_size:
            raise ValueError(
                f"the model takes clips of {self.img_size} (frames, rows, columns), not {tuple(x.shape[2:])}"
            )
        return self.proj(x).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


def position_embeddings(grid: Sequence[int], width: int) -> Tensor:
    """Return sine-cosine position embeddings `[1, N, width]`, an equal part of the width for each axis."""
    half = width // (2 * len(grid))
    waves = 10_000 ** (-torch.arange(half) / half)
    axes = torch.meshgrid(*(torch.arange(length) for length in grid), indexing="ij")
    angles = [axis.flatten()[:, None] * waves for axis in axes]  # [N, half] each
    waved = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return nn.functional.pad(waved, (0, width - waved.shape[1]))[None]


def _reference(model: Model) -> nn.Module:
    from tokenmerge.assets import reference_model

    if model.options:
        raise ConfigError(f"model.options {sorted(model.options)}: {BUNDLED!r} has none; build one with {VIT!r}.")
    import_timm()
    net: nn.Module = reference_model(pretrained=model.pretrained)
    return net


def _vit(options: dict[str, Any], size: tuple[int, ...], classes: int) -> nn.Module:
    """Build timm's `VisionTransformer`, for clips with a tubelet embedding."""
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    options = {"patch_size": 16, **options}
    known = [name for name in inspect.signature(VisionTransformer).parameters if name not in _OURS]
    for name in options:
        if name not in known:
            raise unknown_name(f"option of {VIT}", name, known)
    axes, given = size[1:], options.pop("patch_size")
    patch = (given,) * len(axes) if isinstance(given, int) else tuple(given)
    if len(axes) not in (2, 3) or len(patch) != len(axes) or any(n % p for n, p in zip(axes, patch, strict=True)):
        raise ConfigError(
            f"model.options.patch_size is {given!r} for a size of {size}: give one number, or one for each of rows and "
            "columns, for clips of frames, rows and columns, that divide the size without rest."
        )
    if len(axes) == 3:
        options["embed_layer"] = TubeletEmbed
    make = partial(VisionTransformer, img_size=axes, patch_size=patch, in_chans=size[0], num_classes=classes)
    try:
        net: Any = make(**options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"timm's VisionTransformer does not take model.options {options}: {error}.") from error
    if net.pos_embed is not None:  # learned from a sine-cosine start, as a masked autoencoder keeps it
        start = position_embeddings(net.patch_embed.grid_size, net.embed_dim)
        net.pos_embed.data[:, -start.shape[1] :] = start
    return net  # type: ignore[no-any-return]


# timm options that name files
_FILES = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")
# arguments of timm's class that are derived from the data or are not plain values
_OURS = ("img_size", "in_chans", "num_classes", "embed_layer", "block_fn", "device", "dtype")


def _named(model: Model, size: tuple[int, ...], classes: int, trust_pickle: bool) -> nn.Module:
    timm, prefix = import_timm(), model.name.partition(":")[0]
    if prefix == "timm":
        model = replace(model, name=model.name.removeprefix("timm:"))
    elif prefix not in OF_TIMM and not timm.is_model(model.name.split(".")[0]):
        if model.options:
            what = f"{model.name} is a saved model, or another host's, and has none"
            raise ConfigError(f"model.options {sorted(model.options)}: {what}.")
        net = load_model(model.name, pretrained=model.pretrained, num_classes=classes, trust_pickle=trust_pickle)
        check_takes_images(net, model.name)
        return net
    try:
        fitted = {} if ":" in model.name else _fitted(timm.get_pretrained_cfg(model.name), size)
        try:
            return timm.create_model(model.name, model.pretrained, **{**fitted, **model.options})  # type: ignore[no-any-return]
        except TypeError:  # models without a fixed input size take no `img_size`
            fitted.pop("img_size", None)
            return timm.create_model(model.name, model.pretrained, **{**fitted, **model.options})  # type: ignore[no-any-return]
    except (TypeError, AssertionError) as error:
        raise ConfigError(f"timm's {model.name} does not take model.options {model.options}: {error}.") from error
    except (OSError, RuntimeError, ValueError) as error:
        what = "pretrained weights of" if model.pretrained else "model"
        raise UnsupportedError(
            f"the {what} {model.name!r} could not be loaded: {str(error).rstrip('.')}. Check the name and the network, "
            f"start from new weights (model.pretrained=false), or use the bundled model ({BUNDLED!r})."
        ) from error


def _fitted(config: Any, size: tuple[int, ...]) -> dict[str, Any]:
    """Return the timm arguments that adapt a model made for another size."""
    built = tuple(config.input_size) if config else size
    channels = {} if built[0] == size[0] else {"in_chans": size[0]}
    return channels if built[1:] == size[1:] else {**channels, "img_size": size[1:]}


def _fit_classes(net: Any, name: str, size: tuple[int, ...], classes: int) -> None:
    """Run one input and check that the model has one output per class."""
    dtype = next((p.dtype for p in net.parameters()), torch.float32)
    out = run_images(net, torch.zeros(1, *size, dtype=dtype))
    found = getattr(net, "num_classes", out.shape[-1])
    if out.dim() == 2 and found == classes == out.shape[-1]:
        return
    if not hasattr(net, "reset_classifier"):
        what = (
            "Give the folder that save_pretrained of a Hugging Face model wrote, which gets a new classifier, or change"
        )
        if is_folder(name):
            what = f"For a {type(net).__name__} transformers has no image classifier. Change"
        raise DataError(
            f"the data has {classes} classes, the model {name!r} answers with {tuple(out.shape[1:])}, and it has no "
            f"reset_classifier to change that. {what} its last layer, and save it again."
        )
    net.reset_classifier(classes)
    out = run_images(net, torch.zeros(1, *size, dtype=dtype))
    if tuple(out.shape) != (1, classes):
        raise DataError(f"the model {name!r} answers with {tuple(out.shape[1:])}, not one value per class ({classes}).")
    _log.warning("the model %r has %d classes, the data %d: its classifier is new.", name, found, classes)


def _replaceable(model: Any, state: dict[str, Tensor]) -> tuple[str, ...]:
    """Return the prefixes of the parameter names that may differ: the classifier and the pooling before it."""
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    names = [name for name, module in model.named_modules() if name and module is classifier]
    names = names or ["head", "fc"]
    own = model.state_dict()
    # one model has its last norm after average pooling (`fc_norm`), the other before the class token is taken (`norm`)
    if ("fc_norm.weight" in own) != ("fc_norm.weight" in state):
        names += ["norm", "fc_norm"]
    return tuple(f"{name}." for name in [*names, "attn_pool"])
