"""What people do with their models: after each life a patched model is right, or refuses with an error of our own.

A life is one function. It is given a `Model`, lives on it, and returns. `Model.check` runs it and compares the answer
with the group-mean simulation, or, where there is none, with the model as it is now, patched afresh. Adding a life is
adding a function with `@life`.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere
from torch.nn.utils import prune

import tokenmerge
from helpers import answer, assert_close, bound_attributes, randomised, run_in_threads
from tokenmerge.adapters import ADAPTERS
from tokenmerge.adapters.base import Adapter, WindowSpec
from tokenmerge.errors import TokenMergeError, UnsupportedError

TOLERANCE = 2e-5
# blocks that run in windows leave no groups to simulate with
FAMILIES = {adapter.name: adapter for adapter in ADAPTERS}


class Model:
    """A randomised tiny model of a family, and an input for it."""

    def __init__(self, adapter: Adapter) -> None:
        torch.manual_seed(0)
        self.module, self.x = adapter.tiny()
        randomised(self.module)
        self.x = torch.cat((self.x, torch.randn_like(self.x)))[:2]
        self.adapter = tokenmerge.adapters.find(self.module)

    def patch(self, **options: Any) -> tokenmerge.Handle:
        self.handle = tokenmerge.patch(self.module, **{"r": 2, "track": True, **options})
        return self.handle

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for _, block in self.adapter.blocks(self.module)]

    @property
    def attentions(self) -> list[tuple[nn.Module, str]]:
        """Each block with the name of its attention, where it has one module of it."""
        specs = [(block, getattr(self.adapter.spec(block), "attn", "")) for block in self.blocks]
        return [(block, name) for block, name in specs if name and isinstance(getattr(block, name, None), nn.Module)]

    def run(self, x: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return answer(self.module(self.x if x is None else x)).clone()

    def check(self, starts_afresh: bool = False) -> None:
        """Compare a forward with what it should be; an error of our own is an answer too.

        `starts_afresh`: every block is given tokens that nobody has merged, each at its own place.
        """
        try:
            merged = self.run()
        except TokenMergeError as error:
            assert len(str(error)) > 40
            self.handle.remove()
            return
        handle = self.handle
        assert handle.has_merged
        groups, positions = handle.groups, None if starts_afresh else handle.positions
        is_proportional, config = handle.report().prop_attn, handle.config
        handle.remove()
        assert bound_attributes_of(self.module) == []
        try:
            if not is_proportional:
                raise UnsupportedError("the simulation is of proportional attention")
            expected = answer(tokenmerge.simulate(self.module, groups, self.x, positions=positions))
        except TokenMergeError:
            try:
                with tokenmerge.patched(self.module, config):
                    expected = self.run()
            except TokenMergeError:  # a wrapped attention in windows: its answer is another one than before
                assert (merged - self.run()).abs().max() > 1e-6
                return
        assert_close(merged, expected, TOLERANCE)
        assert (expected - self.run()).abs().max() > 1e-6, "merging changed nothing"


def bound_attributes_of(module: nn.Module) -> list[str]:
    return [name for inner in module.modules() for name in inner.__dict__ if "tokenmerge" in name]


LIVES: dict[str, Callable[[Model], None]] = {}


def life(function: Callable[[Model], None]) -> Callable[[Model], None]:
    LIVES[function.__name__] = function
    return function


@life
def plain(model: Model) -> None:
    model.patch()
    model.check()


@life
def subclassed_to_do_nothing(model: Model) -> None:
    class Own(type(model.module)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model.module.__class__ = Own
    model.patch()
    model.check()


@life
def subclassed_to_pool_by_itself(model: Model) -> None:
    """Every token that leaves the last block counts in the answer."""
    seen: list[Tensor] = []
    last = model.blocks[-1]
    if isinstance(last, nn.ModuleList):
        return  # vit-pytorch calls no blocks: nobody can collect what leaves them

    class Own(type(model.module)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            seen.clear()
            out = answer(super().forward(*args, **kwargs))
            return out.flatten(1)[:, :8].sum(1, keepdim=True) + seen[0].reshape(out.shape[0], -1).mean(1, keepdim=True)

    batch_first = model.adapter.layout(model.module).batch_first
    last.register_forward_hook(
        lambda module, args, out: seen.append(answer(out) if batch_first else answer(out).transpose(0, 1))
    )
    model.module.__class__ = Own
    model.patch()
    model.check()


@life
def attention_wrapped_after(model: Model) -> None:
    model.patch()
    for block, name in model.attentions:
        setattr(block, name, Doubled(getattr(block, name)))
    model.check()


@life
def attention_wrapped_before(model: Model) -> None:
    attentions = model.attentions
    for block, name in attentions:
        setattr(block, name, Doubled(getattr(block, name)))
    before = model.run() if attentions else None
    try:
        model.patch()
    except TokenMergeError:
        assert before is not None and torch.equal(model.run(), before) and bound_attributes_of(model.module) == []
        return
    model.check()


class Doubled(nn.Module):
    """An attention whose answer is doubled."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.inner = attn

    def __getattr__(self, name: str) -> Any:  # as adapters do
        return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2


def _set_block(model: Model, layer: int, block: nn.Module | None) -> None:
    name = model.adapter.blocks(model.module)[layer][0]
    parent = model.module.get_submodule(name.rpartition(".")[0])
    if block is None:
        del parent._modules[name.rpartition(".")[2]]
    else:
        parent._modules[name.rpartition(".")[2]] = block


@life
def a_block_replaced_after(model: Model) -> None:
    other = copy.deepcopy(model.blocks[1])
    model.patch()
    _set_block(model, 1, other)
    model.check()


@life
def the_last_block_cut_after(model: Model) -> None:
    model.patch()
    _set_block(model, -1, None)
    try:
        model.run()
    except TokenMergeError:
        return
    except Exception:  # the host may count its blocks
        model.handle.remove()
        with pytest.raises(Exception, match=""):
            model.run()
        return
    model.check()


@life
def a_block_replaced_by_nothing_after(model: Model) -> None:
    model.patch()
    _set_block(model, 2, _Nothing())
    model.check()


class _Nothing(nn.Module):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return x


@life
def blocks_swapped_after(model: Model) -> None:
    first, second = model.blocks[:2]
    model.patch()
    _set_block(model, 0, second)
    _set_block(model, 1, first)
    model.check()


@life
def linears_with_lora_after(model: Model) -> None:
    model.patch()
    _add_lora(model)
    model.check()


@life
def linears_with_lora_before(model: Model) -> None:
    _add_lora(model)
    before = model.run()
    try:
        model.patch()
    except TokenMergeError:  # torch's own encoder passes LoRA by in eval mode: what it computes is not what it says
        assert torch.equal(model.run(), before) and bound_attributes_of(model.module) == []
        return
    model.check()


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:  # as PEFT's has
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.base.in_features

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def _add_lora(model: Model) -> None:
    for block in model.blocks:
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                # what torch's own attention holds is a subclass of Linear, and used by its weight
                if type(child) is nn.Linear and not isinstance(module, LoRA):
                    setattr(module, name, LoRA(child))


@life
def pruned_before(model: Model) -> None:
    _prune(model)
    model.patch()
    model.check()


@life
def pruned_after(model: Model) -> None:
    model.patch()
    _prune(model)
    model.check()


def _prune(model: Model) -> None:
    for block in model.blocks:
        for module in list(block.modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.dim() == 2 and name in ("weight", "in_proj_weight"):
                    prune.l1_unstructured(module, name, 0.3)


@life
def hooks_that_look(model: Model) -> None:
    """Every module in a block is called as often as without merging."""
    calls: dict[str, int] = {}
    for name, module in model.module.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: calls.update({name: calls.get(name, 0) + 1}))
    model.run()
    unmerged = dict(calls)
    calls.clear()
    model.patch()
    assert calls == {}, "patch() runs the hooks of its user"
    model.run()
    # an attention in windows norms its keys before and after they are merged
    counts = (lambda count: 1) if isinstance(model.adapter.spec(model.blocks[0]), WindowSpec) else (lambda count: count)
    # vit-pytorch's pairs are called while they are patched only
    assert {name: counts(calls.get(name, 0)) for name in unmerged} == {name: counts(n) for name, n in unmerged.items()}


@life
def hooks_that_look_at_gradients(model: Model) -> None:
    """What a backward hook of a module in a block sees without merging, it sees with it."""
    calls: set[tuple[int, str]] = set()
    for layer, block in enumerate(model.blocks):
        for name, module in block.named_modules():
            key = (layer, name)
            module.register_full_backward_hook(lambda module, into, out, key=key: calls.add(key))  # type: ignore[misc]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, where nothing that a module is given needs a gradient
        answer(model.module(model.x)).sum().backward()
        unmerged = set(calls)
        calls.clear()
        model.patch()
        assert calls == set()
        answer(model.module(model.x)).sum().backward()
    assert calls >= unmerged  # timm's attentions use the weight of a module, which is called while merging


@life
def hooks_of_all_modules_that_look(model: Model) -> None:
    calls: set[int] = set()
    inside = {id(module) for block in model.blocks for module in block.modules()}
    hook = everywhere.register_module_forward_hook(lambda module, args, out: calls.add(id(module)))
    try:
        model.module(model.x)  # with gradients: torch's own encoder calls no modules else
        unmerged = calls & inside
        calls.clear()
        model.patch()
        assert not calls & inside
        model.module(model.x)
        assert calls >= unmerged
    finally:
        hook.remove()


def _shift(module: nn.Module, args: Any, out: Any) -> Any:
    return (out[0] + 0.5, *out[1:]) if isinstance(out, tuple) else out + 0.5


@life
def hooks_that_change_what_blocks_put_out(model: Model) -> None:
    for block in model.blocks:
        block.register_forward_hook(_shift)
    handle = model.patch()
    model.check(starts_afresh="after every block" in str(handle.report()))


@life
def hooks_that_change_tokens_in_their_places(model: Model) -> None:
    for block in model.blocks:
        block.register_forward_hook(_shift)
    model.patch(restore="dense")
    model.check(starts_afresh=True)


@life
def a_block_alone(model: Model) -> None:
    """A block that gives an answer gives the same one, whatever else has run."""
    entered: list[Any] = []
    hook = model.blocks[1].register_forward_pre_hook(
        lambda module, args, kwargs: entered.append((args, kwargs)), with_kwargs=True
    )
    model.patch()
    model.run()
    hook.remove()
    args, kwargs = entered[0]
    answers = []
    for _ in range(2):
        with torch.no_grad():
            answers.append(answer(model.blocks[1](*args, **kwargs)).clone())
        model.run(model.x.flip(0) * 0.5)
    assert torch.equal(*answers)
    copied = (args[0].clone(), *args[1:]) if args else args
    try:
        with torch.no_grad():
            alone = answer(model.blocks[1](*copied, **kwargs))
    except TokenMergeError:
        return
    assert alone.shape[1] >= answers[0].shape[1]


@life
def interleaved_halves(model: Model) -> None:
    """Another forward between the blocks of one changes nothing in it."""
    model.patch()
    expected = model.run()
    other, is_inside = model.x.flip(0) * 0.5, []

    def run_another(module: nn.Module, args: Any) -> None:
        if not is_inside:
            is_inside.append(True)
            model.run(other)

    model.blocks[2].register_forward_pre_hook(run_another)
    assert_close(model.run(), expected, 1e-6)


@life
def an_empty_batch(model: Model) -> None:
    try:
        expected = model.run(model.x[:0])
    except Exception:
        return  # the host does not take it
    model.patch()
    assert model.run(model.x[:0]).shape == expected.shape
    model.check()


@life
def another_default_dtype(model: Model) -> None:
    model.patch()
    expected = model.run()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert_close(model.run(), expected, 1e-6)
    finally:
        torch.set_default_dtype(torch.float32)


@life
def another_dtype_after(model: Model) -> None:
    model.patch()
    model.module.double()
    model.x = model.x.double()
    model.check()


@life
def weights_assigned_after(model: Model) -> None:
    model.patch()
    state = {
        name: value * 1.1 if value.is_floating_point() else value for name, value in model.module.state_dict().items()
    }
    model.module.load_state_dict(state, assign=True)
    model.check()


@life
def removed_after_weights_were_assigned(model: Model) -> None:
    model.patch()
    model.module.load_state_dict(model.module.state_dict(), assign=True)
    model.handle.remove()
    assert bound_attributes_of(model.module) == []


@life
def copied_while_disabled(model: Model) -> None:
    model.patch()
    expected = model.run()
    with model.handle.disabled():
        twin = copy.deepcopy(model.module)
    with torch.no_grad():
        assert torch.equal(answer(twin(model.x)), expected)


@life
def a_part_copied(model: Model) -> None:
    """A copy of the blocks has no handle, and can be taken out of merging."""
    name = model.adapter.blocks(model.module)[0][0].rpartition(".")[0]
    before = [sorted(module.__dict__) for module in model.module.get_submodule(name).modules()]
    model.patch()
    part = copy.deepcopy(model.module.get_submodule(name))
    with pytest.raises(tokenmerge.errors.NotPatchedError, match="part of a patched model"):
        tokenmerge.handle_of(part)
    tokenmerge.unpatch(part)
    assert [sorted(module.__dict__) for module in part.modules()] == before
    with pytest.raises(tokenmerge.errors.NotPatchedError, match="part of a patched model"):
        tokenmerge.unpatch(model.module.get_submodule(name))
    model.check()


@life
def pickled(model: Model) -> None:
    model.run()
    try:
        torch.save(model.module, io.BytesIO())
    except AttributeError:  # a backbone of transformers keeps hooks of the host's once it has run
        return
    model.patch()
    expected = model.run()
    file = io.BytesIO()
    torch.save(model.module, file)
    file.seek(0)
    model.module = torch.load(file, weights_only=False)
    assert torch.equal(model.run(), expected)
    model.handle = tokenmerge.handle_of(model.module)
    model.check()


@life
def removed_twice(model: Model) -> None:
    first = model.patch()
    first.remove()
    second = model.patch()
    with pytest.raises(tokenmerge.errors.NotPatchedError, match="was taken out"):
        first.remove()
    assert tokenmerge.handle_of(model.module) is second
    model.check()


@life
def wrapped_and_unwrapped_by_accelerate(model: Model) -> None:
    from accelerate import Accelerator

    model.patch()
    expected = model.run()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    wrapped = accelerator.prepare(model.module)
    model.module = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    assert_close(model.run(), expected, 1e-6)


@life
def four_threads_and_their_own_images(model: Model) -> None:
    model.patch()
    images = [model.x * (i + 1) for i in range(4)]
    expected = [model.run(x) for x in images]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(5):
            if not torch.equal(model.run(images[i]), expected[i]):
                wrong.append(i)

    run_in_threads(work, 4)
    assert wrong == []


@life
def attention_called_twice_by_its_wrapper(model: Model) -> None:
    model.patch()
    for block, name in model.attentions:
        setattr(block, name, Twice(getattr(block, name)))
    model.check()


class Twice(Doubled):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first, again = self.inner(*args, **kwargs), self.inner(*args, **kwargs)
        return (first[0] + again[0], *first[1:]) if isinstance(first, tuple) else first + again


@life
def blocks_wrapped_in_adapters_after(model: Model) -> None:
    """What is put around a block changes what the next one is given."""
    named = model.adapter.blocks(model.module)
    model.patch()
    for name, block in named:
        model.module.get_submodule(name.rpartition(".")[0])._modules[name.rpartition(".")[2]] = Around(block)
    model.run()


class Around(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "block" else getattr(self.block, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.block(*args, **kwargs)
        return (out[0] * 1.5, *out[1:]) if isinstance(out, tuple) else out * 1.5


@life
def tokens_written_into_between_blocks(model: Model) -> None:
    """A hook that writes into what a block puts out means the same as one that returns it, or is refused."""

    def adding(is_in_place: bool) -> Callable[..., Any]:
        def add(module: nn.Module, args: Any, out: Any) -> Any:
            tokens = answer(out)
            shift = torch.linspace(0, 1, tokens.shape[-2])[:, None]
            if is_in_place:
                tokens += shift
                return None
            return (tokens + shift, *out[1:]) if isinstance(out, tuple) else tokens + shift

        return add

    model.patch(restore="dense")
    for mode in (torch.no_grad, torch.inference_mode):
        answers = []
        for is_in_place in (False, True):
            hooks = [block.register_forward_hook(adding(is_in_place)) for block in model.blocks[:-1]]
            try:
                with mode():
                    answers.append(model.run())
            except TokenMergeError:
                return
            finally:
                for hook in hooks:
                    hook.remove()
        assert_close(*answers, 1e-5)


@life
def switched_off_in_the_middle(model: Model) -> None:
    """A forward goes on with the tokens that were merged in it, each with its size."""
    if isinstance(model.blocks[2], nn.ModuleList):
        return  # vit-pytorch calls no blocks
    handle = model.patch(r=[2, 2, *[0] * (len(model.blocks) - 2)])
    expected = model.run()

    def switch_off(module: nn.Module, args: Any) -> None:
        handle.r = 0

    handle.r = 2
    hook = model.blocks[2].register_forward_pre_hook(switch_off)
    assert_close(model.run(), expected, 1e-6)
    handle.r = 2
    model.blocks[1].register_forward_hook(_shift)  # the tokens are others, as many as before
    merged = model.run()
    hook.remove()
    handle.r = [2, 2, *[0] * (len(model.blocks) - 2)]
    assert_close(merged, model.run(), 1e-6)


@pytest.mark.parametrize("name", LIVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_life(family: str, name: str) -> None:
    LIVES[name](Model(FAMILIES[family]))


# a trace takes seconds: a family for each way of merging
COMPILED = ("timm_vit", "hf_vit", "swag", "hf_whisper", "timm_sam")


@pytest.mark.parametrize("family", COMPILED)
@pytest.mark.parametrize("start", [0, 2], ids=["all", "half"])
def test_blocks_compiled_one_by_one(family: str, start: int) -> None:
    torch._dynamo.reset()
    model = Model(FAMILIES[family])
    model.patch()
    expected = [model.run(), model.run(model.x.flip(0) * 0.5)]
    for block in model.blocks[start:]:
        block.compile(backend="eager")
    for x, right in zip((model.x, model.x.flip(0) * 0.5, model.x), (*expected, expected[0]), strict=True):
        assert_close(model.run(x), right, 1e-6)


def test_a_graph_that_breaks_and_an_eager_forward_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    model = Model(FAMILIES["timm_vit"])
    model.patch()
    expected = model.run()
    model.run(model.x.flip(0) * 0.5)
    model.blocks[1].mlp.register_forward_hook(lambda module, args, out: print("a graph cannot hold this"))
    compiled = torch.compile(model.module, backend="eager")
    with torch.no_grad():
        assert_close(compiled(model.x), expected, 1e-6)
    assert "cannot hold" in capsys.readouterr().out


def test_compiled_blocks_in_threads() -> None:
    torch._dynamo.reset()
    model = Model(FAMILIES["timm_vit"])
    model.patch()
    images = [model.x * (i + 1) for i in range(4)]
    expected = [model.run(x) for x in images]
    for block in model.blocks:
        block.compile(backend="eager", dynamic=False)
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(30):
            if (model.run(images[i]) - expected[i]).abs().max() > 1e-4:
                wrong.append(i)

    run_in_threads(work, 4)
    assert wrong == []


@pytest.mark.parametrize("others", [0, 3, 5, 9])
@pytest.mark.parametrize("family", ["timm_vit", "hf_vit"])
def test_checkpoints_find_the_sizes_of_their_own_forward(family: str, others: int) -> None:
    model = Model(FAMILIES[family])
    model.patch()
    model.module.train()

    def gradients() -> list[Tensor]:
        model.module.zero_grad()
        torch.manual_seed(0)
        loss = answer(model.module(model.x)).square().sum()
        for i in range(others):
            model.module(model.x.flip(0) * (i + 1))
        loss.backward()
        return [parameter.grad.clone() for parameter in model.module.parameters() if parameter.grad is not None]

    right = gradients()
    if family == "timm_vit":
        model.module.set_grad_checkpointing()
    else:
        # transformers 5.24 calls it by another name
        name = "activation_checkpointing_enable"
        getattr(model.module, name, None) or (name := "gradient_checkpointing_enable")
        getattr(model.module, name)()
    for got, expected in zip(gradients(), right, strict=True):
        assert_close(got, expected, 1e-5)


def test_leaves_nothing_behind() -> None:
    model = Model(FAMILIES["timm_vit"])
    before = bound_attributes(model.module)
    model.patch()
    model.handle.remove()
    assert bound_attributes(model.module) == before and bound_attributes_of(model.module) == []


@pytest.mark.parametrize("restore", [None, "dense"])
def test_symbolic_traces_are_refused(restore: str | None) -> None:
    model = Model(FAMILIES["timm_vit"])
    torch.fx.symbolic_trace(model.module)
    model.patch(restore=restore)
    with pytest.raises(UnsupportedError, match=r"torch\.fx"):
        torch.fx.symbolic_trace(model.module)


def test_two_branches_of_one_trunk() -> None:
    model = Model(FAMILIES["timm_vit"])
    handle, vit = model.patch(), model.module
    with torch.no_grad():
        entered = vit._pos_embed(vit.patch_embed(model.x))  # type: ignore[operator]
        first, second, third = model.blocks[:3]
        expected = third(second(first(entered)))
        trunk = first(entered)
        branch = second(trunk)
        handle.r = 1
        second(trunk)
        handle.r = 2
        assert_close(third(branch), expected, 1e-6)


@pytest.mark.parametrize("restore", [None, "dense"])
def test_a_backward_removes_as_many_tokens_as_its_forward(restore: str | None) -> None:
    model = Model(FAMILIES["timm_vit"])
    handle = model.patch(restore=restore)

    def gradient(changes: bool) -> Tensor:
        model.module.zero_grad()
        handle.r = 2
        loss = model.module(model.x).square().mean()
        if changes:
            handle.r = 1
        with handle.disabled():
            loss = loss + model.module(model.x).square().mean()
        loss.backward()
        return model.blocks[1].attn.qkv.weight.grad.clone()  # type: ignore[union-attr,operator]

    expected = gradient(changes=False)
    model.module.set_grad_checkpointing()  # type: ignore[operator]
    assert_close(gradient(changes=True), expected, 1e-6)


def test_checkpoints_and_hooks_that_change_tokens() -> None:
    model = Model(FAMILIES["timm_vit"])
    model.patch()
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: out * 1.01)
    gradients = []
    for is_checkpointed in (False, True):
        model.module.set_grad_checkpointing(is_checkpointed)  # type: ignore[operator]
        model.module.zero_grad()
        model.module(model.x).sum().backward()
        gradients.append(model.blocks[0].attn.qkv.weight.grad.clone())  # type: ignore[union-attr,operator]
    assert_close(*gradients, 1e-6)


def _other_head(model: Any) -> None:
    model.forward_head = lambda x: model.head(x[:, 1:].mean(1))


def _other_norm(model: Any) -> None:
    model.norm = nn.Sequential(model.norm, _Mixing())


class _Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)


@pytest.mark.parametrize("change", [_other_head, _other_norm])
def test_methods_that_are_trusted_are_watched(change: Callable[[Any], None]) -> None:
    model = Model(FAMILIES["timm_vit"])
    change(model.module)
    model.patch()
    model.check()
    model = Model(FAMILIES["timm_vit"])
    model.patch()
    model.run()
    change(model.module)
    try:
        merged, groups = model.run(), model.handle.groups
    except TokenMergeError as error:
        assert "patched" in str(error)
        return
    model.handle.remove()
    assert_close(merged, answer(tokenmerge.simulate(model.module, groups, model.x)), 1e-5)


def _a_block_replaced(model: Model) -> None:
    _set_block(model, 1, copy.deepcopy(Model(FAMILIES[model.adapter.name]).blocks[1]))


def _a_block_replaced_by_nothing(model: Model) -> None:
    _set_block(model, 1, _Nothing())


def _a_block_cut(model: Model) -> None:
    _set_block(model, -1, None)


def _a_head_of_its_own(model: Model) -> None:
    _other_head(model.module)


@pytest.mark.parametrize("change", [_a_block_replaced, _a_block_replaced_by_nothing, _a_block_cut, _a_head_of_its_own])
@pytest.mark.parametrize("way", ["compile", "export", "strict export"])
def test_what_was_changed_is_noticed_while_a_graph_is_made(way: str, change: Callable[[Model], None]) -> None:
    """No eager forward has run since."""
    torch._dynamo.reset()
    model = Model(FAMILIES["timm_vit"])
    model.patch()
    change(model)
    with pytest.raises(UnsupportedError, match="patch"):
        if way == "compile":
            torch.compile(model.module, backend="eager")(model.x)
        else:
            torch.export.export(model.module, (model.x,), strict=way == "strict export")


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_a_copy_that_was_changed_is_noticed_while_a_graph_is_made(is_dynamic: bool) -> None:
    torch._dynamo.reset()
    model = Model(FAMILIES["timm_vit"])
    model.patch()
    expected = model.run()
    compiled = torch.compile(model.module, backend="eager", dynamic=is_dynamic)
    twin = Model(FAMILIES["timm_vit"])
    twin.module = copy.deepcopy(model.module)
    _a_block_replaced(twin)
    with torch.no_grad():
        assert_close(compiled(model.x), expected, 1e-6)
        assert_close(compiled(model.x.repeat(2, 1, 1, 1)), expected.repeat(2, 1), 1e-6)
        with pytest.raises(UnsupportedError, match="patched"):
            torch.compile(twin.module, backend="eager", dynamic=is_dynamic)(twin.x)
