"""Collect the tokens that a model's routers score, by forwards on data."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy
import torch
from megatron.core.transformer.moe.router import TopKRouter

from air_moe_megatron.command.forward_step import forward_step
from air_moe_megatron.inference.data import TokenStream, Windows
from air_moe_megatron.learned.centers import Centers
from air_moe_megatron.routers import AIRRouter, HashRouter, find_routers
from air_moe_megatron.routers.base import CompactRouter
from air_moe_megatron.routers.losses import layer_of
from air_moe_megatron.tune.recall import Layer


class TokenCollector:
    """Keeps the tokens that one router scores, after the input norm and without padding. The router does not change.

    ``part`` and ``is_kept`` ([T], one window after the other) say where the tokens of a forward go, and which of them.

    Args:
        router: Megatron's, our top-k or AIR, in evaluation mode.
    """

    def __init__(self, router: TopKRouter) -> None:
        self.router = router
        self.kept: dict[str, list[torch.Tensor]] = {"fit": [], "test": []}
        self.part, self.is_kept = "fit", torch.empty(0, dtype=torch.bool)
        self._hook = router.register_forward_pre_hook(self._keep)

    def remove(self) -> None:
        """Take the collector off the router."""
        self._hook.remove()

    @torch.no_grad()
    def _keep(self, router: TopKRouter, inputs: tuple) -> None:
        hidden = inputs[0].transpose(0, 1).flatten(0, 1)  # [T, H], one window after the other
        is_kept = self.is_kept.to(hidden.device)
        if len(inputs) > 1 and inputs[1] is not None:
            is_kept = is_kept & ~inputs[1].transpose(0, 1).flatten()
        hidden = hidden[is_kept]
        if isinstance(router, CompactRouter):  # Megatron's own scores tokens as they are
            hidden = router.as_scored(hidden)
        self.kept[self.part].append(hidden.float())

    def layer(self, name: str) -> Layer:
        """The router's tokens, its centers, and its lists if training made some."""
        router, centers = self.router, Centers.of(self.router)
        weight, bias = (None if one is None else one.detach().float() for one in (centers.weight, centers.bias))
        fit, test = torch.cat(self.kept["fit"]), torch.cat(self.kept["test"])
        has_lists = isinstance(router, AIRRouter) and router.index.is_built and router.index.source == "tokens"
        return Layer(
            name,
            fit,
            test,
            replace(centers, weight=weight, bias=bias),
            router.topk,
            router.codebook.codewords if has_lists else None,
            router.index.shortlist if has_lists else None,
        )


def collectors_of(model: Sequence[torch.nn.Module]) -> dict[str, TokenCollector]:
    """Put a collector on each router that scores, by the number of its layer. First layers by hash do not score."""
    routers = [router for router in find_routers(model, TopKRouter) if not isinstance(router, HashRouter)]
    return {f"{layer_of(router)}": TokenCollector(router) for router in routers}


def split(stream: TokenStream, seq_length: int, num_fit: int, num_test: int) -> dict[str, numpy.ndarray]:
    """Split a data set into the tokens of the fit and, from its end, the held-out ones, in the ratio of their numbers.

    Raises:
        ValueError: if the data set is too short for a window of each.
    """
    length, least = len(stream.tokens), seq_length + 1  # the last token of a window has a label
    if length < 2 * least:
        raise ValueError(
            f"--data-path entry '{stream.path}' holds {length} tokens, and a window of --seq-length ({seq_length}) to "
            f"fit to and a held-out one take {2 * least}: give more data, or a smaller --seq-length"
        )
    border = min(max(least, round(length * num_fit / (num_fit + num_test))), length - least)
    return {"fit": stream.tokens[:border], "test": stream.tokens[border:]}


@torch.no_grad()
def collect(
    model: Sequence[torch.nn.Module],
    data: Sequence[dict[str, numpy.ndarray]],
    eod: int,
    args: argparse.Namespace,
    num_fit: int,
    num_test: int,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[Layer]:
    """Run a model on windows of data sets, and keep the tokens that its routers score.

    Every token that is kept is another token of the data. No token of the fit is held out.

    Args:
        model: one chunk in evaluation mode, in a world of one rank, as ``restore.build_and_load`` returns it.
        data: the data sets, as :func:`split` returns them, which contribute equally.
        eod: id of the end of a document.
        args: as ``restore.complete_arguments`` returns them.
        num_fit, num_test: largest numbers of tokens per layer; fewer if the data hold fewer.
        progress: wraps the loop over microbatches, such as tqdm.
    Returns:
        the layers with routers that score, in their order, named by the numbers of these layers.
    """
    collectors = collectors_of(model)
    size = args.micro_batch_size
    work: list[tuple[str, list[tuple[Windows, int, int]]]] = []
    for part, number in (("fit", num_fit), ("test", num_test)):
        chosen = []
        for position, parts in enumerate(data):
            share = number // len(data) + (position < number % len(data))
            chosen += _windows(parts[part], eod, args, share)
        chosen += [(*chosen[0][:2], 0)] * (-len(chosen) % size)  # fill the last microbatch
        work += [(part, chosen[first : first + size]) for first in range(0, len(chosen), size)]
    for part, chosen in progress(work):
        numbers = torch.tensor([[number] for *_, number in chosen])
        is_kept = (torch.arange(args.seq_length) < numbers).flatten()
        for collector in collectors.values():
            collector.part, collector.is_kept = part, is_kept
        batch = torch.utils.data.default_collate([windows[index] for windows, index, _ in chosen])
        forward_step(iter([batch]), model[0])
    for collector in collectors.values():
        collector.remove()
    return [collector.layer(name) for name, collector in collectors.items()]


def _windows(
    tokens: numpy.ndarray, eod: int, args: argparse.Namespace, num_tokens: int
) -> list[tuple[Windows, int, int]]:
    """Windows spread evenly over tokens, as (windows, index, number of tokens to keep). They do not overlap."""
    windows, size = Windows(tokens, eod, args), args.seq_length
    num_whole = (len(tokens) - 1) // size  # one more would begin earlier
    indices = numpy.linspace(0, num_whole - 1, min(-(-num_tokens // size), num_whole))
    return [(windows, int(index), min(size, num_tokens - position * size)) for position, index in enumerate(indices)]
