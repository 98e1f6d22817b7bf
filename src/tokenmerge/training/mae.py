"""Masked autoencoders: predict the pixels of hidden patches (arXiv:2111.06377; for clips arXiv:2205.09113).

A random share of the patches is hidden. The encoder sees only the visible patches. A small decoder sees all places,
hidden ones as one learned token, and predicts the pixels of each patch. Written from the papers.

Shapes: B batch, C channels, N patches, K visible ones, P pixels of a patch (all channels).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.errors import ConfigError, UnsupportedError
from tokenmerge.tools.models import import_timm
from tokenmerge.training.models import TubeletEmbed, position_embeddings
from tokenmerge.training.recipe import Masked

__all__ = ["MaskedAutoencoder"]


class MaskedAutoencoder(nn.Module):
    """A timm `VisionTransformer` as the encoder, and a decoder that predicts hidden patches.

    The encoder loses its classifier and attention pool, which this task does not train. The rest of its `state_dict`
    fits the model to fine-tune. Takes images and spectrograms `[B, C, H, W]` or clips `[B, C, T, H, W]`, depending on
    the encoder; in clips the hidden patches are drawn over all frames alike. Raises `UnsupportedError` for an encoder
    whose tokens are not single patches (convolutional stem), and `ConfigError` for a decoder that cannot be built or a
    ratio that hides no patch or all of them.
    """

    places: Tensor

    def __init__(self, encoder: Any, masked: Masked) -> None:
        super().__init__()
        _check(encoder, masked)
        import_timm()
        from timm.models.vision_transformer import Block

        embed = encoder.patch_embed
        encoder.reset_classifier(0, None if encoder.attn_pool is None else "avg")
        self.encoder = encoder
        self.grid, self.patch = tuple(embed.grid_size), tuple(embed.patch_size)
        self.channels, self.prefix = int(embed.proj.in_channels), int(encoder.num_prefix_tokens)
        self.hidden, self.normalise = _hidden(masked.ratio, math.prod(self.grid)), masked.normalise
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.enter = nn.Linear(encoder.embed_dim, masked.width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, masked.width) * 0.02)
        self.register_buffer("places", position_embeddings(self.grid, masked.width), persistent=False)  # [1, N, width]
        self.blocks = nn.Sequential(
            *(Block(masked.width, masked.heads, qkv_bias=True, norm_layer=norm) for _ in range(masked.depth))
        )
        self.norm = norm(masked.width)
        self.predict = nn.Linear(masked.width, self.channels * math.prod(self.patch))
        for part in (self.enter, self.blocks, self.predict):
            part.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean squared error of the hidden patches' pixels, a scalar."""
        visible, hidden = self._draw(x)
        predicted = _pick(self._predict(x, visible), hidden).float()
        wanted = _pick(self.patches(x), hidden).float()
        if self.normalise:
            mean, deviation = _statistics(wanted)
            wanted = (wanted - mean) / deviation
        return (predicted - wanted).square().mean()

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input with hidden patches set to 0, and with hidden patches predicted; both shaped like `x`.

        If the model predicts normalised pixels, each patch gets its true mean and deviation back.
        """
        visible, hidden = self._draw(x)
        patches = self.patches(x)
        predicted = _pick(self._predict(x, visible), hidden).to(x.dtype)
        if self.normalise:
            mean, deviation = _statistics(_pick(patches, hidden))
            predicted = predicted * deviation + mean
        at = hidden[..., None].expand_as(predicted)
        return self._image(patches.scatter(1, at, 0.0)), self._image(patches.scatter(1, at, predicted))

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay; timm's optimisers call this."""
        return {"mask_token", *(f"encoder.{name}" for name in self.encoder.no_weight_decay())}

    def patches(self, x: Tensor) -> Tensor:
        """Cut `[B, C, *axes]` into patches `[B, N, P]`, in the order of the encoder's tokens."""
        axes = range(len(self.grid))
        cut = [length for pair in zip(self.grid, self.patch, strict=True) for length in pair]
        x = x.reshape(*x.shape[:2], *cut)
        return x.permute(0, *(2 + 2 * a for a in axes), *(3 + 2 * a for a in axes), 1).reshape(
            x.shape[0], math.prod(self.grid), -1
        )

    def _image(self, patches: Tensor) -> Tensor:
        """Assemble patches into an image: the inverse of `patches`."""
        D = len(self.grid)
        x = patches.reshape(patches.shape[0], *self.grid, *self.patch, self.channels)
        order = [axis for a in range(D) for axis in (1 + a, 1 + D + a)]
        size = [g * p for g, p in zip(self.grid, self.patch, strict=True)]
        return x.permute(0, 1 + 2 * D, *order).reshape(patches.shape[0], self.channels, *size)

    def _draw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the visible `[B, K]` and hidden `[B, N - K]` patch indices of each sample."""
        order = torch.rand(x.shape[0], math.prod(self.grid), device=x.device).argsort(dim=1)
        return order[:, self.hidden :], order[:, : self.hidden]

    def _predict(self, x: Tensor, visible: Tensor) -> Tensor:  # [B, C, *axes], [B, K] -> [B, N, P]
        tokens = self.enter(self._encode(x, visible))
        seen = tokens[:, self.prefix :]
        B, _, width = seen.shape
        everywhere = self.mask_token.to(seen.dtype).expand(B, math.prod(self.grid), width)
        everywhere = everywhere.scatter(1, visible[..., None].expand_as(seen), seen) + self.places.to(seen.dtype)
        tokens = self.blocks(torch.cat((tokens[:, : self.prefix], everywhere), dim=1))
        predicted: Tensor = self.predict(self.norm(tokens[:, self.prefix :]))
        return predicted

    def _encode(self, x: Tensor, visible: Tensor) -> Tensor:
        """Return the encoder's tokens, `[B, prefix + K, C]`; only visible patches go through its blocks."""
        from timm.models import checkpoint_seq

        encoder = self.encoder
        tokens = encoder._pos_embed(encoder.patch_embed(x))
        tokens = encoder.norm_pre(
            torch.cat((tokens[:, : self.prefix], _pick(tokens[:, self.prefix :], visible)), dim=1)
        )
        checkpointing = encoder.grad_checkpointing and torch.is_grad_enabled()
        tokens = checkpoint_seq(encoder.blocks, tokens) if checkpointing else encoder.blocks(tokens)
        # an encoder with average pooling has its norm after the pooling (`fc_norm`): one of the two is an identity
        normed: Tensor = encoder.fc_norm(encoder.norm(tokens))
        return normed


def _check(encoder: Any, masked: Masked) -> None:
    import_timm()
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    embed: Any = getattr(encoder, "patch_embed", None)
    plain = isinstance(encoder, VisionTransformer) and isinstance(embed, (PatchEmbed, TubeletEmbed))
    if plain:
        covers = all(
            size == grid * patch
            for size, grid, patch in zip(embed.img_size, embed.grid_size, embed.patch_size, strict=True)
        )
        plain = covers and tuple(embed.proj.kernel_size) == tuple(embed.proj.stride) == tuple(embed.patch_size)
    if not plain:
        raise UnsupportedError(
            f"a masked autoencoder needs a timm VisionTransformer whose every token is one patch of the input; "
            f"{type(encoder).__name__} with {type(embed).__name__} is not. Take model.name = 'vit'."
        )
    if masked.width % masked.heads or masked.width < 2 * len(embed.grid_size):
        raise ConfigError(
            f"mae.width is {masked.width}: it must be a multiple of mae.heads ({masked.heads}) and at least "
            f"{2 * len(embed.grid_size)}."
        )


def _hidden(ratio: float, patches: int) -> int:
    hidden = round(ratio * patches)
    if not 0 < hidden < patches:
        raise ConfigError(
            f"mae.ratio {ratio} hides {hidden} of {patches} patches: some must be hidden and some be seen."
        )
    return hidden


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def _pick(x: Tensor, index: Tensor) -> Tensor:  # [B, N, C], [B, K] -> [B, K, C]
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation over the pixels of each patch, `[B, N, 1]` each."""
    mean = patches.mean(dim=-1, keepdim=True)
    return mean, (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
