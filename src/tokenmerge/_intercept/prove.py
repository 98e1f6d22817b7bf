"""Verify on random tokens that a block matches its adapter's description, without changing the model.

Shapes: B batch, N tokens, C channels; `kept` `[B, N]` holds each token's position.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere

from tokenmerge._intercept.layout import TokenLayout, first_of
from tokenmerge._intercept.override import Override
from tokenmerge.errors import AdapterMismatchError, TokenMergeError, UnsupportedModelError

__all__ = ["Parity", "Probe", "called_children", "check_parity", "token_width", "undisturbed"]

_COUNT = 4  # size of the token that the verification repeats
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")
_CONTAINERS = (dict, OrderedDict, list, set)

Run = Callable[..., Any]
Counted = Callable[[Tensor, "Tensor | None", "Tensor | None", dict[str, Any]], Tensor]


class Parity(NamedTuple):
    """The result of verifying a block."""

    difference: float  # largest, of the composition from the block's own forward; NaN: nothing was computed
    counts: bool  # a token of size n is attended to as n tokens


class Probe(NamedTuple):
    """The input of a verification: the number of tokens and the block's extra arguments."""

    tokens: int
    given: dict[str, Any]
    layout: TokenLayout
    label: str
    has_places: bool  # the attention uses places, and the description follows them


def check_parity(block: nn.Module, original: Run, composed: Run, probe: Probe, counted: Counted | None) -> Parity:
    """Compare a block with its description on random tokens, without merging, in eval and train mode.

    Args:
        block: the block to verify.
        original: the block's own forward.
        composed: the forward that the adapter describes.
        probe: the input.
        counted: `counted(x, size, kept, given)` runs the description on tokens `[B, N, C]` of sizes `size` `[B, N]`
            (None: all 1) at their places `kept`. None: neither sizes nor places are verified.

    Raises `UnsupportedModelError` if the block cannot run on tokens. Raises `AdapterMismatchError` if the description
    gives another output, or if the block uses places and the description does not say so. Parameters, buffers, modes,
    attributes, hooks and the random state are left unchanged.
    """
    found = _parameters(block)
    if not found:
        return Parity(0.0, True)
    # tokens get the dtype of the matrices: CLIP keeps its norms in float32
    dtype = next((p.dtype for p in found if p.dim() > 1), found[0].dtype)
    with undisturbed(block) as run:
        _shake(block)
        x = torch.randn(2, probe.tokens, token_width(block), device=found[0].device, dtype=dtype)
        pair = _Pair(block, partial(run, original), partial(run, composed), probe)
        # two images only if both are compared, or if the extra arguments are made for two
        worst = pair.difference(x if x.is_meta or counted is None or probe.given else x[:1], training=True)
        if x.is_meta or counted is None:
            return Parity(max(worst, pair.difference(x, training=False)), True)
        block.eval()
        return _check_tokens(pair, partial(run, counted), x, worst)


class _Pair:
    """A block's own forward and its description, on tokens `[B, N, C]`."""

    def __init__(self, block: nn.Module, original: Run, composed: Run, probe: Probe) -> None:
        self.block, self.original, self.composed, self.probe = block, original, composed, probe

    def difference(self, x: Tensor, training: bool) -> float:
        """Return the largest difference between the two, in train or eval mode; raises if it exceeds rounding."""
        self.block.train(training)
        out = self.own(x)
        tokens = x if self.probe.layout.batch_first else x.transpose(0, 1)
        again = _described(partial(self.composed, tokens, **self.probe.given), self.probe.label)
        return _difference(out, again, self.probe.label)

    def own(self, x: Tensor) -> Any:
        """Return the output of the block's own forward; raises if it cannot run, or gives NaN or inf."""
        label, tokens = self.probe.label, x if self.probe.layout.batch_first else x.transpose(0, 1)
        try:
            out = self.original(tokens, **self.probe.given)
        except TokenMergeError:
            raise
        except Exception as error:  # an unknown block may raise anything
            raise UnsupportedModelError(
                f"{label} cannot be run on random tokens {list(tokens.shape)}, with which it should be proved: "
                f"{type(error).__name__}: {error}. Tokens can be merged in blocks that take one sequence of any length."
            ) from error
        put_out = first_of(out)
        if isinstance(put_out, Tensor) and not put_out.is_meta and not put_out.isfinite().all():
            wrong = [name for name, p in self.block.named_parameters() if not p.isfinite().all()]
            what = f"NaN or inf stand in {', '.join(wrong[:5])}" if wrong else "its weights are finite"
            raise AdapterMismatchError(f"{label} gives NaN or inf for random tokens: {what}. It cannot be proved.")
        return out

    def own_tokens(self, x: Tensor) -> Tensor:
        """Return the output tokens of the block's own forward, batch first."""
        out = first_of(self.own(x))
        tokens: Tensor = out if self.probe.layout.batch_first else out.transpose(0, 1)
        return tokens


def token_width(block: nn.Module) -> int:
    """Return the number of channels of a block's tokens."""
    return int(_parameters(block)[0].shape[-1])  # norm weight [C] or projection [3C, C]


def _parameters(block: nn.Module) -> list[nn.Parameter]:
    # modules without children first: parameters of a block or an attention itself may have any inner width
    leaves = (module for module in block.modules() if next(module.children(), None) is None)
    return [p for module in (*leaves, block) for p in module.parameters() if p.is_floating_point()]


def called_children(
    block: nn.Module, attn: nn.Module, sample: tuple[int, dict[str, Any]], layout: TokenLayout
) -> set[str]:
    """Return the children of an attention that return one row per token when the block runs its own forward."""
    found = _parameters(block)
    called: set[str] = set()
    n, given = sample
    if not found:
        return {name for name, _ in attn.named_children()}
    with undisturbed(block) as run:
        for name, child in attn.named_children():
            child.__dict__["forward"] = _Noting(child, name, n, called)
        dtype = next((p.dtype for p in found if p.dim() > 1), found[0].dtype)
        x = torch.randn(2, n, token_width(block), device=found[0].device, dtype=dtype)
        pair = _Pair(block, partial(run, block.forward), run, Probe(n, given, layout, type(block).__qualname__, False))
        pair.own(x)
    return called


class _Noting(Override):
    def __init__(self, owner: nn.Module, name: str, n: int, called: set[str]) -> None:
        super().__init__(owner)
        self.name, self.n, self.called = name, n, called

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.original(*args, **kwargs)
        if isinstance(out, Tensor) and (out.shape[1:2] if out.dim() == 3 else out.shape[2:3]) == (self.n,):
            self.called.add(self.name)
        return out


@contextmanager
def undisturbed(block: nn.Module) -> Iterator[Run]:
    """Run a block without side effects: yields `run(function, *args)`, which starts each call from the same state.

    Inside, hooks are off and dropout scales instead of drawing. Attributes, buffers, hooks and the random state are
    restored at the end.
    """
    modules = list(block.modules())
    attributes = [(module.__dict__, dict(module.__dict__)) for module in modules]
    contents = [(v, v.copy()) for own, _ in attributes for v in own.values() if type(v) in _CONTAINERS]
    buffers = [(buffer, buffer.detach().clone()) for buffer in block.buffers() if not buffer.is_meta]
    hooks = [(hooks, dict(hooks)) for hooks in (getattr(everywhere, name) for name in _GLOBAL_HOOKS)]
    tensor = next(block.parameters(), None)

    def reset() -> None:
        for buffer, saved in buffers:
            if not torch.equal(buffer, saved):
                buffer.copy_(saved)

    def run(forward: Run, *args: Any, **kwargs: Any) -> Any:
        seed()
        try:
            return forward(*args, **kwargs)
        finally:
            reset()

    devices = [tensor.device] if tensor is not None and tensor.device.type == "cuda" else []

    def seed() -> None:
        # torch.manual_seed queues a call for every backend that has not started yet, which takes milliseconds
        torch.default_generator.manual_seed(0)
        for device in devices:
            torch.cuda.default_generators[device.index].manual_seed(0)

    kind = tensor.device.type if tensor is not None else "cpu"
    # products in half precision would hide or make differences; meta tensors have no autocast
    exact = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    with torch.random.fork_rng(devices=devices), torch.no_grad(), exact:
        try:
            for shared, _ in hooks:
                shared.clear()
            for module in modules:
                module.__dict__.update({name: OrderedDict() for name in _HOOKS})
                if isinstance(module, nn.Dropout) and "forward" not in module.__dict__:
                    module.__dict__["forward"] = _Scaling(module)
            seed()
            yield run
        finally:
            for shared, saved_hooks in hooks:
                shared.update(saved_hooks)
            for own, saved_attributes in attributes:
                _put_back(own, saved_attributes)
            for container, saved_content in contents:
                _put_back(container, saved_content)


def _put_back(now: Any, before: Any) -> None:
    """Restore a container's content, if it changed."""
    is_same = len(now) == len(before) and all(map(operator.is_, now, before))
    if is_same and (not isinstance(now, dict) or all(map(operator.is_, now.values(), before.values()))):
        return
    now.clear()
    now.extend(before) if isinstance(now, list) else now.update(before)


class _Scaling(Override):
    """Dropout that scales instead of drawing: draws depend on the memory order, which a composition may change."""

    def __call__(self, x: Tensor) -> Tensor:
        return x * (1 - 0.5 * self.owner.p) if self.owner.training else x  # type: ignore[operator]


def _shake(block: nn.Module) -> None:
    """Randomise constant parameters: a gate or scale that starts at zero would hide the branch that it scales."""
    drawn: dict[int, nn.Parameter] = {}
    for module in block.modules():
        for name, p in module._parameters.items():
            if type(p) is not nn.Parameter or not p.is_floating_point() or p.is_meta or not _is_constant(p):
                continue
            if id(p) not in drawn:
                drawn[id(p)] = nn.Parameter(_drawn(p), requires_grad=p.requires_grad)
            module._parameters[name] = drawn[id(p)]


def _is_constant(p: Tensor) -> bool:
    flat = p.detach().reshape(-1)
    # for most parameters the first values suffice
    return flat.numel() > 0 and all(bool((part == flat[0]).all()) for part in (flat[:16], flat))


def _drawn(p: Tensor) -> Tensor:
    if p.dim() > 1 and not p.any():
        return torch.randn_like(p).mul(p[0].numel() ** -0.5)
    return torch.rand_like(p) * 0.4 + 0.5


def _described(run: Run, label: str) -> Any:
    """Return the output of the block's description."""
    try:
        return run()
    except TokenMergeError:
        raise
    except Exception as error:
        raise AdapterMismatchError(
            f"{label} does not behave as its adapter describes: its own forward runs, its description raises "
            f"{type(error).__name__}: {error}. The model was left as it was."
        ) from error


def _difference(original: Any, composed: Any, label: str) -> float:
    if type(original) is not type(composed) or not isinstance(first_of(original), Tensor):
        raise AdapterMismatchError(
            f"{label} returns {type(original).__name__}, its description {type(composed).__name__}; expected are "
            "tokens, or a tuple that starts with them. No adapter describes that."
        )
    original, composed = first_of(original), first_of(composed)
    if original.is_meta:
        return float("nan")
    difference = (original - composed).abs().max().item()
    if not difference <= _tolerance(original):  # NaN fails too
        raise AdapterMismatchError(
            f"{label} does not behave as its adapter describes: max |difference| {difference:.2g} with nothing merged. "
            "The host library's block has probably changed, or a subclass adds a step of its own; the model was left "
            "as it was. Describe the block in an adapter of its own (CONTRIBUTING.md, 'a new family')."
        )
    return float(difference)


def _check_tokens(pair: _Pair, counted: Run, x: Tensor, worst: float) -> Parity:
    """Verify in eval mode that a token of size n counts as n tokens, and that the order of tokens does not matter."""
    probe = pair.probe
    # a prefix given by the user may be any number; then no block treats these tokens differently
    prefix = probe.layout.prefix if probe.layout.prefix < x.shape[1] // 2 else 0
    many, kept, size = _repeated(x, prefix)
    order = _order(many.shape[1], prefix, x.device)
    back = order.argsort()[: x.shape[1]]
    if probe.has_places:
        worst = max(worst, pair.difference(x, training=False))
        run = partial(counted, many[:, order], None, kept[:, order], probe.given)
        repeated = _described(run, probe.label)[:, back]
    else:
        # compare the own forward on repeated tokens with the description on sizes: this verifies both
        repeated = pair.own_tokens(many[:, order])[:, back]
    try:
        weighed = counted(x, size, None, probe.given)
    except Exception:  # an attention that does not support this mask may raise anything
        weighed = None
    if weighed is not None and _agree(weighed, repeated, partial(counted, x, None, None, probe.given)):
        return Parity(worst, True)
    worst = max(worst, pair.difference(x, training=False))
    order = _order(x.shape[1], prefix, x.device)
    plain = counted(x, None, None, probe.given)
    turned = _described(partial(counted, x[:, order], None, order.expand(2, -1), probe.given), probe.label)
    if not (turned - plain[:, order]).abs().max().item() <= _tolerance(plain):
        raise AdapterMismatchError(
            f"{probe.label} treats a token by its place in the sequence (relative or rotary positions, a convolution, "
            "a causal mask), which its adapter does not describe: with tokens merged, places would be wrong. The model "
            "was left as it was."
        )
    return Parity(worst, False)


def _repeated(x: Tensor, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return `x` with one token per image repeated at the end, the places of all tokens, and the equivalent sizes."""
    B, N, _ = x.shape
    rows = torch.arange(B, device=x.device)
    one = prefix + (N - prefix) // (2 + rows)  # [B]
    again = one[:, None].expand(-1, _COUNT - 1)
    many = torch.cat((x, x[rows[:, None], again]), dim=1)
    kept = torch.cat((torch.arange(N, device=x.device).expand(B, -1), again), dim=1)
    size = torch.ones(B, N, device=x.device).index_put((rows, one), torch.tensor(float(_COUNT), device=x.device))
    return many, kept, size


def _order(n: int, prefix: int, device: torch.device) -> Tensor:
    """Return a permutation of the tokens after the prefix; a rotation would not reveal a convolution."""
    return torch.tensor([*range(prefix), *range(prefix, n, 2), *range(prefix + 1, n, 2)], device=device)


def _agree(weighed: Tensor, repeated: Tensor, plain: Callable[[], Tensor]) -> bool:
    error = (weighed - repeated).abs()
    if weighed.shape != repeated.shape or not error.max().item() <= _tolerance(repeated):
        return False
    if weighed.dtype in (torch.float32, torch.float64):
        return True
    # with coarse rounding, a missing bias could pass the tolerance
    effect = (repeated - plain()).abs().mean().item()
    return effect <= 1e-2 * repeated.abs().mean().item() or error.mean().item() <= 0.5 * effect


def _tolerance(expected: Tensor) -> float:
    relative = 1e-5 if expected.dtype in (torch.float32, torch.float64) else 4e-2
    return relative * max(1.0, expected.abs().max().item())
