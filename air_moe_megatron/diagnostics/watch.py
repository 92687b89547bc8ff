"""Watch the routers during one step: the time of their forwards, samples of tokens, and the tokens of each codeword."""

import time
from collections.abc import Sequence

import torch

from air_moe_megatron.diagnostics.observation import CodewordCounter
from air_moe_megatron.process_groups import group_size
from air_moe_megatron.routers import AIRRouter, find_routers
from air_moe_megatron.routers.base import CompactRouter
from air_moe_megatron.routers.token_ids import embedding_of, tell_token_ids

_TOKEN_IDS = 2**16
"""How many tokens of a step have their ids counted, over all ranks."""


class Stopwatch:
    """Adds up the time of a router's forwards, recomputed ones included, by hooks that :meth:`end` removes.

    On a GPU the time is taken between two events in the stream, elsewhere by the host's clock.
    """

    def __init__(self, router: CompactRouter) -> None:
        self._is_cuda = router.expert_load.is_cuda
        self._marks: list[tuple] = []
        self._begun: float | torch.cuda.Event | None = None
        self._handles = [
            router.register_forward_pre_hook(self._begin),
            router.register_forward_hook(self._finish),
        ]

    def _now(self) -> "float | torch.cuda.Event":
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self, *_: object) -> None:
        self._begun = self._now()

    def _finish(self, *_: object) -> None:
        self._marks.append((self._begun, self._now()))

    def end(self) -> float:
        """Remove the hooks and return the seconds; the device must have finished the step."""
        for handle in self._handles:
            handle.remove()
        if self._is_cuda:
            return sum(begin.elapsed_time(end) for begin, end in self._marks) / 1e3
        return sum(end - begin for begin, end in self._marks)


class StepWatch:
    """Watches the routers of a pipeline stage from its construction until :meth:`end`.

    It does not communicate, but waits for the device at the start and at the end.

    Args:
        model: Megatron's list of model chunks.
        routers: the routers in it.
    """

    def __init__(self, model: Sequence[torch.nn.Module], routers: Sequence[CompactRouter]) -> None:
        self._routers = routers
        self._is_cuda = any(router.expert_load.is_cuda for router in routers)
        self._stopwatches = [Stopwatch(router) for router in routers]
        self._handles = []
        for router in routers:
            if isinstance(router, AIRRouter):
                capacity = max(1, _TOKEN_IDS // group_size(router.tp_dp_cp_group)) if knows_token_ids(router) else 0
                router.observer = CodewordCounter(router.sizes.num_clusters, capacity, router.expert_load.device)
                router.keeps_sample = True
        for chunk in model:
            observers = [router.observer for router in routers_with_ids(chunk)]
            embedding = embedding_of(chunk)
            if observers and embedding is not None:
                self._handles.append(tell_token_ids(embedding, observers))
        self._began = self._clock()

    def _clock(self) -> float:
        if self._is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def end(self) -> tuple[float, list[float], dict[CompactRouter, CodewordCounter]]:
        """Stop watching. The samples stay with the routers.

        Returns:
            seconds of the step; for each router the seconds of its forwards; what each AIR router counted.
        """
        seconds = self._clock() - self._began
        for handle in self._handles:
            handle.remove()
        counters = {}
        for router in self._routers:
            if isinstance(router, AIRRouter):
                counters[router], router.observer, router.keeps_sample = router.observer, None, False
        return seconds, [stopwatch.end() for stopwatch in self._stopwatches], counters


def knows_token_ids(router: CompactRouter) -> bool:
    """Whether token ids can reach a router: only if its config would allow a hash router. The same on all ranks."""
    config = router.config
    mixes_microbatches = config.pipeline_model_parallel_size > 1 or config.overlap_moe_expert_parallel_comm
    return not mixes_microbatches and config.mtp_num_layers is None


def routers_with_ids(chunk: torch.nn.Module) -> list[AIRRouter]:
    """The AIR routers of a model chunk to which token ids can be brought."""
    return [router for router in find_routers(chunk, AIRRouter) if knows_token_ids(router)]
