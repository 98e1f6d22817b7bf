"""Masked autoencoders: what is hidden stays hidden, what is seen costs nothing, and they learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import assert_close, randomised
from tokenmerge import assets
from tokenmerge.errors import ConfigError, UnsupportedError
from tokenmerge.training.mae import MaskedAutoencoder
from tokenmerge.training.models import build_model, load_weights
from tokenmerge.training.recipe import Masked, Model

SIZES = {
    "image": ((3, 16, 16), 4),
    "spectrogram": ((1, 16, 32), (4, 8)),
    "clip": ((2, 4, 8, 16), (2, 4, 4)),
}
SMALL = Masked(ratio=0.75, width=24, depth=1, heads=2)


def encoder(kind: str, **options: Any) -> Any:
    size, patch = SIZES[kind]
    settings = {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": patch, **options}
    return build_model(Model(name="vit", options=settings), size, 5)


def inputs(kind: str, count: int = 2) -> Tensor:
    return torch.randn(count, *SIZES[kind][0])


def drawn(model: MaskedAutoencoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the model draws next, its patches seen and hidden, with the random state put back."""
    state = torch.get_rng_state()
    found = model._draw(x)
    torch.set_rng_state(state)
    return found


def with_patches(model: MaskedAutoencoder, x: Tensor, index: Tensor, value: Tensor) -> Tensor:
    patches = model.patches(x)
    return model._image(patches.scatter(1, index[..., None].expand(-1, -1, patches.shape[-1]), value))


@pytest.mark.parametrize("kind", SIZES)
def test_patches_are_those_of_the_encoder_and_go_back(kind: str) -> None:
    model = MaskedAutoencoder(encoder(kind), SMALL)
    x = inputs(kind)
    patches = model.patches(x)
    assert_close(model._image(patches), x, 0.0)
    # a pixel of patch n moves token n of the encoder's embedding, and no other
    embed = model.encoder.patch_embed
    for n in (0, 5, patches.shape[1] - 1):
        moved = with_patches(model, x, torch.full((2, 1), n), torch.full((2, 1, patches.shape[-1]), 3.0))
        changed = (embed(moved) - embed(x)).abs().amax(dim=(0, 2)) > 1e-6
        assert changed.nonzero().flatten().tolist() == [n]


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}])
@pytest.mark.parametrize("kind", SIZES)
def test_hidden_pixels_reach_neither_the_encoder_nor_the_prediction(kind: str, options: dict[str, Any]) -> None:
    model = randomised(MaskedAutoencoder(encoder(kind, **options), SMALL)).eval()
    x = inputs(kind)
    visible, hidden = model._draw(x)
    assert hidden.shape[1] == 0.75 * 16 and visible.shape[1] == 4
    both = torch.cat((visible, hidden), dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(16).expand(2, -1))
    noise = torch.randn(2, hidden.shape[1], model.patches(x).shape[-1])
    with torch.no_grad():
        tokens = model._encode(x, visible)
        assert tokens.shape[1] == model.prefix + 4
        assert_close(model._encode(with_patches(model, x, hidden, noise), visible), tokens, 0.0)
        assert_close(model._predict(with_patches(model, x, hidden, noise), visible), model._predict(x, visible), 0.0)
        seen = with_patches(model, x, visible, noise[:, :4])
        assert (model._predict(seen, visible) - model._predict(x, visible)).abs().max() > 1e-3


def test_the_loss_is_of_hidden_patches_alone() -> None:
    model = MaskedAutoencoder(encoder("image"), Masked(ratio=0.5, width=24, depth=1, heads=2, normalise=False))
    # a prediction of 0 everywhere: the loss is what hidden pixels are, squared
    nn.init.zeros_(model.predict.weight)
    x = inputs("image")
    _, hidden = drawn(model, x)
    patches = with_patches(model, torch.zeros_like(x), hidden, torch.full((2, 8, 48), 3.0))
    state = torch.get_rng_state()
    assert_close(model(patches), torch.tensor(9.0))
    torch.set_rng_state(state)
    visible, _ = drawn(model, x)
    assert_close(model(with_patches(model, patches, visible, torch.full((2, 8, 48), 50.0))), torch.tensor(9.0))


def test_normalised_pixels_have_no_mean_and_no_contrast() -> None:
    model = MaskedAutoencoder(encoder("image"), SMALL)
    x = inputs("image")
    nn.init.zeros_(model.predict.weight)
    assert_close(model(x), torch.tensor((48 - 1) / 48), 1e-3)  # the variance of pixels scaled to that of a sample
    assert_close(model(5 * x + 2), torch.tensor((48 - 1) / 48), 1e-3)


@pytest.mark.parametrize("kind", SIZES)
def test_it_learns_one_batch_and_every_parameter_learns(kind: str) -> None:
    model = MaskedAutoencoder(encoder(kind, reg_tokens=1), Masked(ratio=0.6, width=24, depth=1, heads=2))
    # smooth pictures: what is hidden can be told from what is seen
    axes = [torch.linspace(-2, 2, length) for length in SIZES[kind][0][1:]]
    planes = sum(torch.meshgrid(*axes, indexing="ij"))
    x = torch.stack([(planes * scale).sin() for scale in (0.5, 1.0, 1.5, 2.0)])[:, None]
    x = x.expand(-1, SIZES[kind][0][0], *x.shape[2:]).clone()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    losses = []
    for _ in range(150):
        loss = model(x)
        assert loss.shape == ()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("kind", SIZES)
def test_a_reconstruction_keeps_what_was_seen(kind: str, normalise: bool) -> None:
    model = MaskedAutoencoder(encoder(kind), Masked(ratio=0.75, width=24, depth=1, heads=2, normalise=normalise)).eval()
    x = inputs(kind)
    visible, hidden = drawn(model, x)
    with torch.no_grad():
        shown, whole = model.reconstruct(x)
    assert shown.shape == whole.shape == x.shape
    assert_close(model.patches(shown)[1, visible[1]], model.patches(x)[1, visible[1]], 0.0)
    assert_close(model.patches(whole)[1, visible[1]], model.patches(x)[1, visible[1]], 0.0)
    assert not model.patches(shown)[1, hidden[1]].any()
    assert (model.patches(whole)[1, hidden[1]] - model.patches(x)[1, hidden[1]]).abs().amax(dim=1).min() > 0
    # what is predicted costs what the loss says
    if not normalise:
        state = torch.get_rng_state()
        loss = model(x)
        torch.set_rng_state(state)
        _, whole = model.reconstruct(x)
        assert_close((whole - x).square().mean() / 0.75, loss, 1e-5)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_encoder_goes_straight_into_the_model_that_is_fine_tuned(pool: str, tmp_path: Any) -> None:
    from safetensors.torch import save_file

    model = MaskedAutoencoder(encoder("clip", global_pool=pool), SMALL)
    save_file(model.encoder.state_dict(), tmp_path / "model.safetensors")
    sentence = load_weights(encoder("clip", global_pool=pool), tmp_path)
    assert "new: head.bias, head.weight." in sentence and "not used" not in sentence


def test_recomputed_blocks_give_the_same_gradient() -> None:
    model = MaskedAutoencoder(encoder("image"), SMALL)
    x, gradients = inputs("image"), []
    for checkpointing in (False, True):
        model.encoder.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        model.zero_grad()
        model(x).backward()
        gradients.append(model.encoder.pos_embed.grad.clone())
    assert_close(gradients[0], gradients[1], 0.0)


def test_what_cannot_be_masked_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="HybridEmbed"):
        MaskedAutoencoder(assets.reference_model(pretrained=False), SMALL)
    with pytest.raises(UnsupportedError, match="Linear"):
        MaskedAutoencoder(nn.Linear(2, 2), SMALL)
    for ratio in (0.0, 1.0, 0.99):
        with pytest.raises(ConfigError, match="of 16 patches"):
            MaskedAutoencoder(encoder("image"), Masked(ratio=ratio, width=24, heads=2))
    with pytest.raises(ConfigError, match=r"mae\.heads"):
        MaskedAutoencoder(encoder("image"), Masked(width=25, heads=2))
