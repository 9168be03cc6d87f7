"""Routing losses on several processes: values and gradients of all tokens, from sums exchanged once."""

import socket
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection

import pytest
import torch
import torch.distributed as dist

from m3vit.models.router import Router, Routing
from m3vit.training.routing_losses import ROUTING_LOSSES, RoutingSums, routing_losses, sums_for
from m3vit.training.step import add_up, without_tokens
from tests.training.launching import CONTEXT

LAYERS, TASKS, EXPERTS, TOKENS = 2, 3, 6, 40


def routers(noise: float, learned: bool, restricted: bool) -> list[Router]:
    """Return one router a layer, with the same weights in every process."""
    torch.manual_seed(3)
    allowed = [[0, 2, 3, 5], None, [1, 2, 4]] if restricted else ()
    return [
        Router(4, EXPERTS, 2, TASKS, "multi", noise, learned_noise=learned, allowed=allowed).train()
        for _ in range(LAYERS)
    ]


def some_tokens(routing: Routing, first: int, last: int) -> Routing:
    return Routing(*(f[:, first:last] if f is not None and f.ndim == 3 else f for f in routing))


def compare(rank: int, cut: int, noise: float, learned: bool, restricted: bool) -> None:
    """Assert that two processes, one with `cut` of the tokens, compute what one computes with all of them."""
    layers = routers(noise, learned, restricted)
    parameters = [parameter for router in layers for parameter in router.parameters()]
    x = torch.randn(LAYERS, TASKS, TOKENS, 4)
    # Every process draws the noise of all tokens, the same, and takes its share of them.
    everything = [router(tokens, tuple(range(TASKS))) for router, tokens in zip(layers, x, strict=True)]
    names = list(ROUTING_LOSSES)

    expected = routing_losses(sums_for(everything, names), names)
    wanted = torch.autograd.grad(sum(expected.values()), parameters, retain_graph=True, allow_unused=True)

    span = (0, cut) if rank == 0 else (cut, TOKENS)
    mine = [some_tokens(routing, *span) for routing in everything]
    if span[0] == span[1]:  # as a process without an image does: a forward pass of its own, which does not count
        mine = [without_tokens(router(torch.randn(TASKS, 5, 4), tuple(range(TASKS)))) for router in layers]
    found = routing_losses(add_up(sums_for(mine, names)), names)
    gradients = torch.autograd.grad(sum(found.values()), parameters, allow_unused=True)

    values = torch.stack(list(found.values())).detach()
    torch.testing.assert_close(values, torch.stack(list(expected.values())).detach(), rtol=1e-5, atol=1e-6)
    others = [torch.empty_like(values) for _ in range(2)]
    dist.all_gather(others, values)
    assert torch.equal(*others), "the same bits in each process"
    for want, part in zip(wanted, gradients, strict=True):
        assert (want is None) == (part is None), "a parameter is reached in every process"
        if part is not None:
            dist.all_reduce(part)
            torch.testing.assert_close(part, want, rtol=1e-4, atol=1e-6)


def exchanged_at_once(rank: int) -> None:
    """Assert that one all_reduce does for all layers, and how much of what it carries."""
    routings = [router(torch.randn(TASKS, 7, 4), tuple(range(TASKS))) for router in routers(1.0, True, False)]
    calls = []
    original = dist.all_reduce

    def counted(tensor: torch.Tensor) -> None:
        calls.append(tensor.nbytes)
        original(tensor)

    dist.all_reduce = counted
    for names in (["balance"], list(ROUTING_LOSSES)):
        add_up(sums_for(routings, names))
    dist.all_reduce = original
    # 8 bytes: two sums an expert, or all four and one of the logits; and the number of tokens.
    assert calls == [LAYERS * 8 * (1 + TASKS * 2 * EXPERTS), LAYERS * 8 * (1 + TASKS * (4 * EXPERTS + 1))]
    # Counts are exact where float32 is not, and stay whole numbers.
    count = torch.tensor([[2**25 + 1 + 2 * rank]])
    (sums,) = add_up([RoutingSums(torch.tensor(2**40 + 1), chosen_RE=count)])
    assert sums.chosen_RE.dtype == torch.int64 and sums.chosen_RE.item() == 2**26 + 4
    assert sums.tokens.item() == 2**41 + 2


def process(rank: int, port: int, pipe: Connection) -> None:
    """Be one of two processes; send back what went wrong, or nothing."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timeout=timedelta(seconds=60), world_size=2, rank=rank)
    try:
        for cut in (20, 13, 0):
            for noise, learned in ((0.0, False), (2.0, False), (2.0, True)):
                for restricted in (False, True):
                    compare(rank, cut, noise, learned, restricted)
        exchanged_at_once(rank)
        pipe.send("")
    except BaseException:
        pipe.send(traceback.format_exc())
    finally:
        dist.destroy_process_group()


@pytest.mark.slow  # starting processes
def test_two_processes_see_all_tokens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(2):
        here, there = CONTEXT.Pipe(duplex=False)
        processes.append(CONTEXT.Process(target=process, args=(rank, port, there)))
        processes[-1].start()
        there.close()
        pipes.append(here)
    messages = [pipe.recv() if pipe.poll(90) else "no answer" for pipe in pipes]
    for started in processes:
        started.join(30)
        started.kill()
    if any(messages):
        pytest.fail("\n".join(messages))


def test_one_process_exchanges_nothing() -> None:
    layers = sums_for([routers(0.0, False, False)[0](torch.randn(TASKS, 5, 4), (0, 1, 2))], ["balance"])
    assert add_up(layers) is layers
