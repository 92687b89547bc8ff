"""When lists are rebuilt, in which turns, and how many dot products a rebuild takes.

``index.py`` says how lists of source 'tokens' are rebuilt. Those of source 'experts' are due at the same updates, and
are made all at once.

Legend: E experts, C clusters, L shortlist, Q pool, B blocks of which one has its turn in a rebuild.
"""

from typing import NamedTuple

# docs/codebook.md#rebuilding-the-lists has the measured cost and recall of these values.
NUM_TURNS = 8  # B
NUM_NEIGHBORS = 2  # codewords whose pools a codeword chooses from
POOL = 4  # Q / L
BLOCK = 32  # codewords per matrix product; fixed, so that its bits do not depend on the number of ranks and steps
_GPU_BLOCK = 128  # least number of codewords in a block on a GPU: a tile of the kernel
_GPU_SCORES = 2**24  # scores per block on a GPU, enough to hide most of the time of kernel launches

NUM_FULL_REBUILDS = 2
"""Full rebuilds of lists of source 'tokens': the first, and the one after the first update, which replaces all
codewords."""


class RebuildState(NamedTuple):
    """How far the rebuilds of an index are."""

    built_at: int  # number of codebook updates when the lists were made; -1 before there are lists
    num_rebuilds: int  # number of rebuilds so far
    num_done: int  # number of codewords that have selected experts for the next lists

    def due(self, interval: int) -> int:
        """The number of codebook updates after which lists are due next."""
        return 0 if self.built_at < 0 else next_rebuild(self.built_at, interval)


class Schedule(NamedTuple):
    """The blocks of codewords in which lists are rebuilt, and their turns."""

    block_size: int  # codewords per block
    num_turns: int  # B, number of rebuilds in which every block gets one turn

    def has_turn(self, first: int, num_rebuilds: int) -> bool:
        """Whether the block that begins with codeword ``first`` chooses from all experts after so many rebuilds."""
        return first // self.block_size % self.num_turns == num_rebuilds % self.num_turns

    def rows_due(self, state: RebuildState, num_updates: int, due: int, num_clusters: int) -> slice:
        """The codewords that select experts in a step, so that all have done so once lists are ``due``.

        Example: blocks of 32, lists made after 100 updates and due after 104, C = 128, 32 codewords done: after 102
        updates the codewords 32 to 63.
        """
        share = num_clusters * (num_updates - state.built_at) // (due - state.built_at)
        return slice(state.num_done, num_clusters if num_updates >= due else share // self.block_size * self.block_size)


def next_rebuild(built_at: int, interval: int) -> int:
    """The number of updates after which lists are due next, if the last ones were made after ``built_at`` updates.

    Tokens and centers move faster while the codebook is young. So with an interval of 20 the lists are rebuilt whenever
    the codebook's age has grown by a tenth, and at least every 20 updates.

    Example: interval 20, from 18 on: 19, 20, 22, 24, 26, 28, 30, 33, ..., 196, 215, 235, 255.
    """
    return built_at + min(max(1, 2 * built_at // interval), interval)


def num_rebuilds(num_steps: int, interval: int) -> int:
    """How often lists are made in the first ``num_steps`` steps of a training, with one codebook update per step.

    Example: interval 20: 29 in the first 40 steps, 57 in 400.
    """
    count, due = 0, 0
    while due < num_steps:
        count, due = count + 1, next_rebuild(due, interval)
    return count


def num_turns(num_clusters: int) -> int:
    """B, the number of rebuilds in which every codeword gets one turn; 1 if all codewords fit one block."""
    return min(NUM_TURNS, -(-num_clusters // BLOCK))


def schedule(num_experts: int, num_clusters: int, on_gpu: bool) -> Schedule:
    """The blocks of codewords and their turns.

    A GPU scores all experts faster than it gathers a codeword's candidates (docs/codebook.md#rebuilding-the-lists).

    Example: E = 65,536, C = 1024: blocks of 32 and B = 8 on a CPU, of 256 and B = 1 on a GPU.
    """
    if not on_gpu:
        return Schedule(BLOCK, num_turns(num_clusters))
    return Schedule(max(_GPU_BLOCK, _GPU_SCORES // num_experts // _GPU_BLOCK * _GPU_BLOCK), num_turns=1)


def rebuild_products(num_experts: int, num_clusters: int, shortlist_size: int, on_gpu: bool = False) -> float:
    """Mean number of dot products in a rebuild, over all ranks; of a codeword with a codeword or an expert center.

    Example: with E = 65,536, C = 1024 and L = 128, 128 codewords are multiplied with all experts, and each of the other
    896 with 128 codewords and 1664 experts. That is 15% of the C * E products that a GPU computes.
    """
    if on_gpu:
        return num_clusters * num_experts
    in_turn = num_clusters / num_turns(num_clusters)
    pool_size = min(POOL * shortlist_size, num_experts)
    num_candidates = min(shortlist_size + (1 + NUM_NEIGHBORS) * pool_size, num_experts)
    return in_turn * num_experts + (num_clusters - in_turn) * (in_turn + num_candidates)
