"""What only a CUDA device can show: same answers as on the CPU, in every precision, captured and in threads."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch

import tokenmerge
from helpers import assert_close, run_in_threads, tiny_vit
from tokenmerge import kernels

pytestmark = pytest.mark.gpu
X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_cuda_merges_as_the_cpu_does() -> None:
    model = tiny_vit(init_values=0.5).double()
    tokenmerge.patch(model, r=8, track=True)
    with torch.no_grad():
        expected = model(X.double())
        groups = tokenmerge.handle_of(model).groups[-1]
        assert_close(model.cuda()(X.cuda().double()).cpu(), expected, 1e-6)
    assert torch.equal(tokenmerge.handle_of(model).groups[-1].cpu(), groups)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_with_the_bias(dtype: torch.dtype) -> None:
    model = tiny_vit().cuda()
    tokenmerge.patch(model, r=8, prop_attn=True)
    with torch.inference_mode():
        expected = model(X.cuda())
        low = copy.deepcopy(model).to(dtype)(X.cuda().to(dtype))
    assert low.dtype == dtype and low.isfinite().all() and low.shape == expected.shape


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_replays_give_fresh_answers(mode: str) -> None:
    model = tiny_vit().cuda()
    tokenmerge.patch(model, r=8)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.inference_mode():
        for seed in range(4):
            x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).cuda()
            assert_close(compiled(x).clone(), model(x), 1e-3)


@pytest.mark.parametrize("version", ["chosen", "triton"])
def test_a_captured_graph_gives_fresh_answers(version: str) -> None:
    model = tiny_vit().cuda()
    tokenmerge.patch(model, r=8)
    x = X.cuda()
    with torch.inference_mode(), kernels.force("triton") if version == "triton" else nullcontext():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        for seed in range(3):
            x.copy_(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            assert_close(out, model(x), 1e-4)


def test_checkpointed_gradients_from_the_autograd_thread() -> None:
    model = tiny_vit(init_values=0.5).cuda().train()
    tokenmerge.patch(model, r=3)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(X.cuda()).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert_close(again, plain, 1e-4)


def test_four_threads_at_once() -> None:
    model = tiny_vit().cuda()
    tokenmerge.patch(model, r=8)
    inputs = [torch.randn(2 + i, 3, 32, 32).cuda() for i in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(40):
                if not torch.allclose(model(inputs[i]), expected[i], atol=1e-4):
                    wrong.append(i)

    run_in_threads(work, 4)
    assert wrong == []
