"""torch's own transformer encoder, alone and inside a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from other_models import (
    built,
    check_refused,
    images,
)
from torch import Tensor, nn

import tokenmerge
from helpers import assert_close
from promises import Family, check_promises
from tokenmerge.errors import UnsupportedError, UnsupportedModelError

TORCH = "torch.nn.TransformerEncoder"


def _encoder(**options: Any) -> nn.TransformerEncoder:
    settings = {"dim_feedforward": 64, "dropout": 0.0, "batch_first": True, "norm_first": True}
    layer = nn.TransformerEncoderLayer(32, 4, **{**settings, **options})
    return nn.TransformerEncoder(layer, 4, norm=nn.LayerNorm(32), enable_nested_tensor=False)


class _Classifier(nn.Module):
    """A ViT as anyone writes it around torch's encoder."""

    def __init__(self, has_class_token: bool, encoder: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 4, 4)
        if has_class_token:
            self.cls_token = nn.Parameter(torch.randn(1, 1, 32))
        self.encoder = encoder
        self.classify = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mT
        if not hasattr(self, "cls_token"):
            return self.classify(self.encoder(x).mean(dim=1))
        x = self.encoder(torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1))
        return self.classify(x[:, 0])


ENCODERS: dict[str, dict[str, Any]] = {
    "batch-first": {},
    "sequence-first": {"batch_first": False},
    "gelu": {"activation": "gelu"},
    "activation-module": {"activation": nn.Tanh()},
    "no-bias": {"bias": False},
    "dropout": {"dropout": 0.1},
    "sequence-first-dropout": {"dropout": 0.1, "batch_first": False},
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_promises(name: str) -> None:
    options = ENCODERS[name]
    model, x = built(_encoder(**options)), torch.randn(2, 40, 32).double()
    x = x if options.get("batch_first", True) else x.transpose(0, 1)
    assert check_promises(model, x, r=6, tolerance=1e-6, family=Family(TORCH, name)) == [34, 28, 22, 16]
    with tokenmerge.patched(model.train(), r=6):
        model(x).sum().backward()


@pytest.mark.parametrize("has_class_token", [True, False], ids=["class-token", "mean"])
def test_a_model_around_an_encoder(has_class_token: bool) -> None:
    model, x = built(_Classifier(has_class_token, _encoder())), images()
    family = Family(TORCH, f"a model around one encoder, {has_class_token=}")
    check_promises(model, x, r=6, tolerance=1e-6, family=family)
    handle = tokenmerge.patch(model, r=6)
    assert handle.report().adapter == "torch_encoder" and handle.prefix == has_class_token
    assert handle.report().limits == [
        "tokens are put back in their places after the last block: a torch encoder hands out tokens by their place "
        f"(in front, {int(has_class_token)} are protected as class tokens)"
    ]


@pytest.mark.parametrize("prop_attn", [True, False], ids=["proportional", "plain"])
def test_padding_is_never_merged_with_tokens(prop_attn: bool) -> None:
    model, x = built(_encoder()), torch.randn(2, 24, 32).double()
    lengths = (24, 15)
    padding = torch.stack([torch.arange(24) >= length for length in lengths])
    handle = tokenmerge.patch(model, r=3, prop_attn=prop_attn, track=True)
    merged, groups = model(x, src_key_padding_mask=padding), handle.groups
    for row, length in zip(groups[-1], lengths, strict=True):
        assert not set(row[:length].tolist()) & set(row[length:].tolist())
    assert handle.sizes.sum(dim=1).tolist() == [float(length) for length in lengths]
    # what stands in the padding does not matter
    other = x.masked_fill(padding[..., None], 7.0)
    assert_close(model(other, src_key_padding_mask=padding)[1, :15], merged[1, :15], 1e-6)
    handle.remove()
    if prop_attn:
        simulated = tokenmerge.simulate(model, groups, x, src_key_padding_mask=padding)
        assert_close(merged[0], simulated[0], 1e-6)
        assert_close(merged[1, :15], simulated[1, :15], 1e-6)


def test_masks_of_places_are_refused() -> None:
    model, x = _encoder().eval(), torch.randn(2, 12, 32)
    causal = nn.Transformer.generate_square_subsequent_mask(12)
    expected = model(x, mask=causal)
    handle = tokenmerge.patch(model, r=2)
    with pytest.raises(UnsupportedError, match=r"called with 'src_mask', 'is_causal' while tokens are merged"):
        model(x, mask=causal, is_causal=True)
    with pytest.raises(UnsupportedError, match=r"without a batch, \(12, 32\): give it as a batch of one"):
        model(x[0])
    handle.r = 0
    assert torch.equal(model(x, mask=causal), expected)


def test_encoders_that_cannot_be_merged_in_are_refused() -> None:
    post = _encoder(norm_first=False)
    check_refused(post, r"norm_first=False, post-norm.*Only norm_first=True", Family(TORCH, "post-norm"))
    two = nn.ModuleDict({"image": _encoder(), "text": _encoder()})
    with pytest.raises(UnsupportedModelError, match=r"holds 2 encoders: image, text\. Patch one of them"):
        tokenmerge.patch(two, r=2)
    other = _encoder()
    other.layers[0] = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"layers are of class Identity"):
        tokenmerge.patch(other, r=2)
    odd = _encoder()
    odd.layers[0].self_attn = nn.MultiheadAttention(32, 4, kdim=16, vdim=16, batch_first=True)
    with pytest.raises(UnsupportedError, match="separate key/value widths"):
        tokenmerge.patch(odd, r=2)


def test_a_compiled_model_is_refused_with_what_to_patch() -> None:
    compiled = torch.compile(_Classifier(True, _encoder()), backend="eager")
    with pytest.raises(UnsupportedModelError, match="wraps a _Classifier: patch that one"):
        tokenmerge.patch(compiled, r=2)
