"""Process groups: modules that hold them and can still be copied and pickled, collectives over them, and their end."""

import contextlib
import copy
import gc
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch.distributed import ProcessGroup


class HoldsProcessGroups:
    """Base class that makes objects with process groups as attributes copyable and picklable.

    A deep copy shares the groups. A pickle holds Megatron's name of each group. Loading it looks the group up by that
    name, and gives None if Megatron's parallel state is not initialized or did not make the group.

    A module's parameters keep Megatron's marks, such as ``allreduce`` and ``sequence_parallel``, which torch drops from
    a deep copy. They lose their ``main_grad``, which belongs to the data-parallel wrapper of the original.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> "HoldsProcessGroups":
        memo |= {id(value): value for value in vars(self).values() if isinstance(value, ProcessGroup)}
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(vars(self), memo))
        if isinstance(self, torch.nn.Module):
            for name, parameter in self.named_parameters():
                vars(copied.get_parameter(name)).update(_marks_of(parameter))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        names = {id(group): name for name, group in _megatron_groups().items()}
        state = {
            name: _GroupName(names.get(id(value))) if isinstance(value, ProcessGroup) else value
            for name, value in vars(self).items()
        }
        if isinstance(self, torch.nn.Module):
            state["_parameters"] = {
                name: None if one is None else _without_main_grad(one) for name, one in self._parameters.items()
            }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        groups = _megatron_groups()
        state = {
            name: groups.get(value.name) if isinstance(value, _GroupName) else value for name, value in state.items()
        }
        if isinstance(self, torch.nn.Module):
            torch.nn.Module.__setstate__(self, state)
        else:
            self.__dict__.update(state)


def _marks_of(parameter: torch.nn.Parameter) -> dict[str, bool | int | str]:
    """What Megatron has noted on a parameter about its layout."""
    return {
        name: value
        for name, value in vars(parameter).items()
        if isinstance(value, (bool, int, str)) and name != "grad_added_to_main_grad"
    }


def _without_main_grad(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """A parameter with the same memory and marks."""
    bare = torch.nn.Parameter(parameter.data, parameter.requires_grad)
    vars(bare).update(_marks_of(parameter))
    return bare


class _GroupName:
    """Placeholder for a process group in a pickle; the name is None for a group that Megatron did not make."""

    def __init__(self, name: str | None) -> None:
        self.name = name


def _megatron_groups() -> dict[str, ProcessGroup]:
    """Megatron's process groups by their names in a ProcessGroupCollection; empty before they are made."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    if not parallel_state.is_initialized():
        return {}
    return {
        name: group
        for name, group in vars(ProcessGroupCollection.use_mpu_process_groups()).items()
        if isinstance(group, ProcessGroup)
    }


def group_size(group: ProcessGroup | None) -> int:
    """Number of ranks of a group; 1 for None, which means this rank alone."""
    return 1 if group is None else group.size()


def sum_over_ranks(values: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """Sum values in place over the ranks of a group by an all-reduce, and return them; no-op for one rank."""
    if group_size(group) > 1:
        torch.distributed.all_reduce(values, group=group)
    return values


def gather_sizes(
    sizes: dict[str, int], group: ProcessGroup | None, device: torch.device, may_differ: Collection[str] = ()
) -> dict[str, list[int]]:
    """Gather named sizes of all expert-parallel ranks, and require that they are equal.

    Communicates (one all-gather of an int64 per size) and waits for the device, unless there is one rank.

    Args:
        sizes: the same names in the same order on every rank.
        group: the expert-parallel ranks; None means this rank alone.
        device: device on which the group communicates.
        may_differ: names of sizes that need not be equal.
    Returns:
        name -> the value on each rank.
    Raises:
        ValueError: on every rank, if a size differs.
    """
    num_ranks = group_size(group)
    if num_ranks == 1:
        return {name: [size] for name, size in sizes.items()}
    own = torch.tensor(list(sizes.values()), device=device)
    gathered = own.new_empty(num_ranks * own.numel())
    torch.distributed.all_gather_into_tensor(gathered, own, group=group)
    values_of = dict(zip(sizes, gathered.view(num_ranks, -1).t().tolist(), strict=True))
    for name, values in values_of.items():
        if name not in may_differ and len(set(values)) > 1:
            raise ValueError(f"{name} differs between the expert-parallel ranks: {values}")
    return values_of


def is_in_writers_pipeline() -> bool:
    """Whether this rank is in the same pipeline as the last rank, which prints Megatron's log and has its writers."""
    from megatron.core import parallel_state

    pipeline = torch.distributed.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    return torch.distributed.get_world_size() - 1 in pipeline


def gather_from_stages(found: Any) -> list[Any]:
    """Gather one object per pipeline stage, in order, over the pipeline of the last rank; all its ranks must call it.

    Ranks of other pipelines get a list of their own object alone.
    """
    from megatron.core import parallel_state

    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1 or not is_in_writers_pipeline():
        return [found]
    stages = [None] * group.size()
    torch.distributed.all_gather_object(stages, found, group=group)
    return stages


def release_process_groups() -> None:
    """Destroy the process groups of a finished run, and end their threads; do nothing if there are none.

    Megatron leaves this to the end of the process. There a gloo thread that frees its last tensor while Python shuts
    down aborts the process ("terminate called without an active exception"), although all work is done.
    """
    from megatron.core import parallel_state

    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        gc.collect()  # a group's threads are joined when the last reference to it is gone


@contextlib.contextmanager
def process_groups_released() -> Iterator[None]:
    """A context that calls ``release_process_groups`` on exit, even if Megatron ends a run early.

    ``--exit-interval``, ``--exit-duration-in-mins`` and the exit signals end Megatron's loop by SystemExit, on all
    ranks. After other exceptions nothing is released, because a group may wait for a rank that has failed.
    """
    try:
        yield
    except SystemExit:
        release_process_groups()
        raise
    release_process_groups()
