"""What every model family promises, checked on one model of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge import adapters
from tokenmerge.adapters.base import Adapter, TokenLayout
from tokenmerge.api import patch as patch_model
from tokenmerge.errors import AlreadyPatchedError, ConfigError, DataError, unknown_name
from tokenmerge.handle import handle_of
from tokenmerge.measure.outputs import answer
from tokenmerge.report import Report
from tokenmerge.testing.comparing import assert_close, assert_equal, expect, keep_promises, traces
from tokenmerge.testing.lives import by_position, checkpointing, copies, export, one_graph, threads
from tokenmerge.testing.merging import FamilyCase, group_mean
from tokenmerge.testing.models.drawn import randomised

__all__ = ["PROMISES", "check_adapter", "tiny_model"]


def tiny_model(family: str) -> tuple[nn.Module, Tensor]:
    """Return a small model of a family by its name, every parameter drawn, in eval mode, and an input of two for it.

    Raises `UnknownNameError` for a name that no family has, `ModuleNotFoundError` where its host is not installed.
    """
    for adapter in adapters.known():
        if adapter.name == family:
            return _tiny(adapter)
    raise unknown_name("model family", family, adapters.list_adapters())


def _tiny(adapter: Adapter) -> tuple[nn.Module, Tensor]:
    model, x = adapter.tiny()
    return randomised(model).eval(), torch.randn(2, *x.shape[1:])


@lru_cache(maxsize=4)
def _kept(adapter: Adapter) -> tuple[nn.Module, Tensor]:
    """The model that all promises of a family are checked on, each on a copy of its own."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return _tiny(adapter)


def check_adapter(
    adapter: Adapter | nn.Module,
    *inputs: Any,
    r: Any = 2,
    output: Callable[[Any], Tensor] = answer,
    options: Mapping[str, Any] | None = None,
    patch: Mapping[str, Any] | None = None,
    described_by: Adapter | None = None,
    tolerance: float = 1e-5,
    is_simulated: bool = True,
    entry: str = "",
    only: Iterable[str] = (),
    skip: Mapping[str, str] | None = None,
) -> Report | None:
    """Check a model family on its own small model, or any model that can be patched.

    Args:
        adapter: the family's adapter, whose `tiny()` model is checked; or a model in eval mode, best with the
            parameters that `randomised` draws: a fresh one hides mistakes.
        inputs: what the model is called with, a batch of two or more different ones; of an adapter those of `tiny()`.
        r: how many tokens each block shall remove.
        output: picks the tensor to compare out of what the model returns.
        options: further arguments of the model, by name.
        patch: further options of `tokenmerge.patch`, such as the names of a model that no adapter describes.
        described_by: the adapter of a model that `patch` finds by such names.
        tolerance: how far merging may be from the group-mean simulation, relative to the largest value.
        is_simulated: False for a model that the simulation does not know, such as one that merges inside windows.
        entry: path of the part that the inputs enter, such as the vision tower of a model that is patched as a whole;
            only for the promise `group_mean`.
        only: the names of some of `PROMISES`; all by default.
        skip: promises that mean nothing for this model, each with the reason.

    Returns the report of the model that merged, where `group_mean` was checked, else None. Raises `AssertionError` with
    the promise that is broken, the block and the numbers; `DataError` for a model without inputs or in train mode and
    for inputs that are equal, `ConfigError` for what is neither an adapter nor a model.
    """
    _check_kind(adapter)
    if isinstance(adapter, Adapter):
        model, x = _kept(adapter)
        subject, inputs = f"the family {adapter.name!r}", inputs or (x,)
    else:
        model, subject = adapter, f"this {type(adapter).__qualname__}"
    if not inputs and not options:
        raise DataError(f"{subject} needs inputs, a batch of two or more different ones: check_adapter(model, x).")
    _check_given(subject, model, inputs)
    case = FamilyCase(
        model,
        inputs,
        dict(options or {}),
        {"prop_attn": True, "track": True, **(patch or {})},
        r,
        output,
        tolerance,
        is_simulated,
        adapter if isinstance(adapter, Adapter) else described_by,
        is_named=isinstance(adapter, Adapter),
        entry=entry,
    )
    promises = {name: check for name, check in PROMISES.items() if case.is_named or check is not found}
    with _listed(adapter):
        keep_promises(subject, promises, case, only, skip)
    return case.reports[-1] if case.reports else None


def _check_kind(adapter: Any) -> None:
    if isinstance(adapter, type):
        name = adapter.__name__
        given = f"{name}()" if issubclass(adapter, Adapter) else f"{name}(...).eval(), x"
        raise ConfigError(f"check_adapter takes an instance, not the class {name}: check_adapter({given}).")
    if not isinstance(adapter, (Adapter, nn.Module)):
        raise ConfigError(f"check_adapter takes an adapter or a model, not {adapter!r}: check_adapter(MyFamily()).")


def _check_given(subject: str, model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Refuse what would hide mistakes: a model in train mode, and inputs that are alike."""
    parts = model.named_modules()
    training = [path or "itself" for path, part in parts if part.training and (not path or not any(part.children()))]
    if training:  # lists of blocks do nothing by themselves
        raise DataError(f"{subject} is in train mode ({training[0]}): call model.eval() first.")
    for x in inputs:
        if isinstance(x, Tensor) and x.dim() > 1 and len(x) > 1:
            alike = [at for at in range(1, len(x)) if torch.equal(x[at], x[0])]
            if alike:
                raise DataError(
                    f"inputs 0 and {alike[0]} of {subject} are equal: give different ones, torch.randn(...)."
                )
            return


@contextmanager
def _listed(adapter: Any) -> Iterator[None]:
    """Let `patch` find a family that is not registered yet."""
    is_new = isinstance(adapter, Adapter) and adapter.name not in adapters.list_adapters()
    if is_new:
        adapters.register(adapter)
    try:
        yield
    finally:
        if is_new:
            adapters.unregister(adapter.name)


def found(case: FamilyCase) -> None:
    """`patch` takes this adapter for its own model, whatever other families there are."""
    assert case.adapter is not None
    used, name = adapters.find(case.model), case.adapter.name
    expect(used.name == name, f"{type(case.model).__qualname__} is taken for {used.name!r}, not for {name!r}")


def layout(case: FamilyCase) -> None:
    """`layout` says how many tokens enter the blocks, which of them are protected, and how the patches lie."""
    model = case.fresh()
    adapter = case.resolved(model)
    said, cutter, cuts = adapter.layout(model), adapter.surroundings(model).cutter, []
    handle = patch_model(model, r=0, **case.patch)
    first, entered = handle.runners[0], []
    own = first.block.__dict__["forward"]

    def watched(*args: Any, **kwargs: Any) -> Any:
        x = next(iter((*args, *kwargs.values())))  # a host may give them by name
        tokens = x.detach() if said.batch_first else x.detach().transpose(0, 1)
        if said.is_packed:
            tokens = tokens.reshape(case.inputs[0].shape[0], -1, tokens.shape[-1])
        entered.append(tokens.flatten(1, -2))  # of a block that takes a grid too
        return own(*args, **kwargs)

    def cut(part: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        cuts.append(adapter.host.grid_of(part, next(iter(args), None), out))

    first.block.__dict__["forward"] = watched
    if cutter is not None and said.grid:
        cutter.register_forward_hook(cut)
    case.run(model)
    x, grid = entered[0], cuts[0] if len(cuts) == 1 else None
    n, built = x.shape[1], said.input_size in (None, tuple(case.inputs[0].shape[1:]))
    if case.is_named:
        expect(built, f"layout.input_size is {said.input_size}, tiny() gives inputs {tuple(case.inputs[0].shape[1:])}")
    if said.tokens is not None and built:
        expect(n == said.tokens, f"layout.tokens is {said.tokens}, and {n} tokens enter the first block")
    if said.grid and built:
        expect(grid in (None, said.grid), f"layout.grid is {said.grid}, and the images are cut into {grid} patches")
        cells = said.grid[0] * said.grid[1]
        made = f"layout.prefix {said.prefix}, layout.grid {said.grid} and layout.suffix {said.suffix}"
        expect(cells + said.protected == n, f"{made} make {cells + said.protected} tokens; {n} enter the first block")
    _check_protected(x, said)


def _check_protected(x: Tensor, said: TokenLayout) -> None:
    """Class tokens and registers enter the first block alike for all inputs, and patches do not."""
    alike, n = (x == x[:1]).all(dim=2).all(dim=0), x.shape[1]  # [N]
    behind = n - said.suffix
    for field, inside, beyond in (
        ("prefix", [*range(said.prefix)], said.prefix),
        ("suffix", [*range(behind, n)], behind - 1),
    ):
        count, others = getattr(said, field), [place for place in inside if not alike[place]]
        expect(
            not others,
            f"layout.{field} is {count}, and of these tokens {others} differ from input to input when they enter the "
            "first block, as patches do",
        )
        expect(
            not (said.prefix <= beyond < behind and alike[beyond]),
            f"layout.{field} is {count}, and token {beyond} is the same for all inputs when it enters the first block, "
            "as class tokens and registers are",
        )


def original(case: FamilyCase) -> None:
    """With r = 0 the answers are the model's own, in eval and in train mode; removal leaves no trace."""
    model = case.fresh()
    keys, own, before = list(model.state_dict()), case.run(model), (traces(model), set(dir(model)))
    expect(own.isfinite().all(), f"{int((~own.isfinite()).sum())} values of the model's own answer are not finite")
    in_train = case.run(model.train())
    handle = patch_model(model.eval(), r=0, **case.patch)
    expect(list(model.state_dict()) == keys, "the names of the state dict are others while patched")
    assert_equal(case.run(model), own, "r = 0, eval mode")
    assert_equal(case.run(model.train()), in_train, "r = 0, train mode")
    handle.r = case.r
    merged = case.run(model.eval())
    same = merged.shape == own.shape and torch.equal(merged, own)
    expect(not same, f"r = {case.r} gives the same answer as r = 0: nothing was merged")
    handle.remove()
    assert_equal(case.run(model), own, "after removal, eval mode")
    assert_equal(case.run(model.train()), in_train, "after removal, train mode")
    after = traces(model.eval()), set(dir(model))
    changed = sorted(path or "the model" for path in before[0] if before[0][path] != after[0].get(path))
    expect(before == after, f"removal leaves traces in {', '.join(changed) or 'the model'}")


def recomposed(case: FamilyCase) -> None:
    """Every block, put together from its parts as its description says, computes what its own forward does."""
    model = case.fresh()
    own, handle = case.run(model), patch_model(model, r=0, **case.patch)
    for runner, name in zip(handle.runners, case.blocks(model), strict=True):
        bound = runner.block.__dict__["forward"]
        runner.block.__dict__["forward"] = by_position(runner.block, runner.parity)
        assert_close(case.run(model), own, 1e-6 if own.dtype != torch.float64 else 1e-12, f"block {name}")
        runner.block.__dict__["forward"] = bound


def deterministic(case: FamilyCase) -> None:
    """The same inputs give the same answer, bit by bit."""
    model = case.merging()
    assert_equal(case.run(model), case.run(model), "two runs")


def single(case: FamilyCase) -> None:
    """The answer to an input does not depend on the others in its batch."""
    model = case.merging()
    whole = case.run(model)
    for at in range(len(whole)):
        alone = case.taking(lambda value, at=at: value[at : at + 1]).run(model)  # type: ignore[misc]
        assert_close(alone[0], whole[at], what=f"input {at} alone and in its batch")


def gradients(case: FamilyCase) -> None:
    """Gradients reach the inputs, and every parameter that they reach without merging."""
    model, case = case.fresh().train(), case.differentiable()
    case.loss(model).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    case = case.differentiable()
    patch_model(model, r=case.r, **case.patch)
    case.loss(model).backward()
    for value in case.leaves():
        assert value.grad is not None, "no gradient reaches the inputs"
        expect(value.grad.abs().sum() > 0, "the gradient of the inputs is zero")
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    lost, more = sorted(trained - grads.keys()), sorted(grads.keys() - trained)
    expect(not lost and not more, f"parameters that lost their gradient: {lost}; that got one: {more}")
    bad = sorted(name for name, grad in grads.items() if not grad.isfinite().all())
    expect(not bad, f"the gradients of {bad} are not finite")


def low_precision(case: FamilyCase) -> None:
    """It runs in bfloat16, under autocast and in inference mode, with answers near those of full precision."""
    model = case.fresh()
    own = case.run(model)
    patch_model(model, r=case.r, **case.patch)
    expected = case.run(model)
    with torch.inference_mode():
        assert_close(case.output(case.call(model)), expected, 1e-6, "inference mode")
    low, inputs = copy.deepcopy(model).bfloat16(), case.taking(_halved)
    out = inputs.run(low)
    expect(
        out.dtype == torch.bfloat16 and out.isfinite().all(), f"in bfloat16 the answer is {out.dtype}, or not finite"
    )
    with torch.autocast("cpu", torch.bfloat16):
        expect(case.run(model).isfinite().all(), "under autocast the answer is not finite")
    unmerged = copy.deepcopy(model).bfloat16()
    handle_of(unmerged).r = 0
    assert_close(inputs.run(unmerged).float(), own.float(), 0.1, "r = 0 in bfloat16")


def _halved(value: Tensor) -> Tensor:
    return value.bfloat16() if value.is_floating_point() else value


def backends(case: FamilyCase) -> None:
    """Fused and unfused attention give the same answer."""
    model = case.merging()
    expected = case.run(model)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert_close(case.run(model), expected, what="unfused attention")


def attached_once(case: FamilyCase) -> None:
    """Patching again is refused, and the first one stays."""
    model = case.merging()
    expected = case.run(model)
    try:
        patch_model(model, r=1, **case.patch)
    except AlreadyPatchedError as error:
        expect("call unpatch" in str(error), f"the refusal does not say what to do: {error}")
    else:
        raise AssertionError("a second patch was taken")
    assert_equal(case.run(model), expected, "after a refused patch")


def random_state(case: FamilyCase) -> None:
    """Patching does not move the random state."""
    model = case.fresh()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    patch_model(model, r=case.r, **case.patch)
    assert_equal(torch.rand(3), expected, "what is drawn after patching")


PROMISES: dict[str, Callable[[FamilyCase], None]] = {
    check.__name__: check
    for check in (
        *(
            found,
            layout,
            original,
            recomposed,
            group_mean,
            deterministic,
            single,
            gradients,
            checkpointing,
            copies,
            threads,
        ),
        *(low_precision, backends, attached_once, random_state, one_graph, export),
    )
}
