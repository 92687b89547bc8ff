"""The roofline bound of a row: the least time that its work takes at the rates measured on this machine.

A phase takes at least its arithmetic over the measured matmul rate, and at least its compulsory bytes over the measured
copy rate. Its bound is the larger of the two, and a row's bound is the sum over its phases. :func:`bound` computes it
for every benchmark.

Few bytes count as compulsory, so that results do not look closer to the bound than they are. Left out are intermediate
results, indices, counts, and repeated reads of what could stay in a cache. A weight's gradient is written once in the
weight's dtype, although Megatron's ``main_grad`` is fp32 and is also read. Each case has the bound of its own work:
that of ``TopKRouter`` includes the dense product and the dense maps that its interface requires.

Legend: T tokens, H hidden, E experts, C clusters, L shortlist, K top-k, F rows of an expert.
"""

from dataclasses import dataclass

import torch

from benchmarks.measure import clock

_ID_BYTES = 4  # int32
_FP32_BYTES = 4
_ADAM_BYTES = 7 * _FP32_BYTES  # a parameter's value and two moments are read and written, its gradient is read


@dataclass(frozen=True)
class Ceilings:
    """The rates that were measured on this machine, in this process."""

    flops_per_s: float  # of a large matmul
    bytes_per_s: float  # of a large copy, read and written bytes together


@dataclass(frozen=True)
class Work:
    """The least work of a phase."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


def bound(phases: dict[str, Work], ceilings: Ceilings) -> dict[str, float]:
    """Lower bounds on the seconds of each phase, and their sum as "total".

    Example: 100 FLOPs and 30 bytes forward, 20 FLOPs and 40 bytes backward, at 10 FLOP/s and 2 byte/s: 15 s forward,
    20 s backward, 35 s in total.
    """
    seconds = {
        name: max(work.flops / ceilings.flops_per_s, work.bytes / ceilings.bytes_per_s) for name, work in phases.items()
    }
    return {**seconds, "total": sum(seconds.values())}


OF_CLOCK = ("times_bound", "tokens_per_s", "gflops_per_s", "gbytes_per_s")
"""The columns of :func:`bound_columns` that depend on the time of the row."""


def bound_columns(phases: dict[str, Work], ceilings: Ceilings, seconds: float, tokens: int | None) -> dict:
    """Columns about the bound, for a row whose total took ``seconds``.

    Args:
        tokens: tokens of the row; None if it has none, such as the rebuild of the shortlists.
    """
    least = bound(phases, ceilings)
    done = sum(phases.values(), Work())
    return {
        "bound_forward_ms": _milliseconds(least.get("forward")),
        "bound_backward_ms": _milliseconds(least.get("backward")),
        "bound_ms": _milliseconds(least["total"]),
        "times_bound": round(seconds / least["total"], 2),
        "tokens_per_s": "" if tokens is None else round(tokens / seconds),
        "gflops_per_s": round(done.flops / seconds / 1e9, 2),
        "ceiling_gflops_per_s": round(ceilings.flops_per_s / 1e9, 1),
        "gbytes_per_s": round(done.bytes / seconds / 1e9, 2),
        "ceiling_gbytes_per_s": round(ceilings.bytes_per_s / 1e9, 1),
    }


def _milliseconds(seconds):
    return "" if seconds is None else round(1e3 * seconds, 4)


class CeilingProbe:
    """A large matmul and a large copy, which are timed repeatedly between the runs of the cases.

    Args:
        dtype: dtype of the matmul. On a CPU it is fp32, because a dtype without instructions gives too low a ceiling.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        on_gpu = device.type == "cuda"
        self.device, self.size, numel = device, (8192 if on_gpu else 2048), (2**28 if on_gpu else 2**25)
        shape, dtype = (self.size, self.size), dtype if on_gpu else torch.float32
        self._left, self._right, self._product = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
        self._source, self._target = (torch.zeros(numel, device=device) for _ in range(2))  # touched: no page faults

    def matmul(self) -> dict[str, float]:
        """Seconds of one matmul, the best of a few."""
        return self._best(lambda: torch.mm(self._left, self._right, out=self._product), 2)

    def copy(self) -> dict[str, float]:
        """Seconds of one copy, the best of a few."""
        return self._best(lambda: self._target.copy_(self._source), 3)

    def ceilings(self, matmul_seconds: float, copy_seconds: float) -> Ceilings:
        """The rates that follow from these times."""
        return Ceilings(2 * self.size**3 / matmul_seconds, 2 * self._source.nbytes / copy_seconds)

    def _best(self, work, runs):
        seconds = []
        for _ in range(runs):
            start = clock(self.device)
            work()
            seconds.append(clock(self.device) - start)
        return {"total": min(seconds)}


def together(*parts: dict[str, Work]) -> dict[str, Work]:
    """Join the phases of several parts of a step; phases with the same name are added."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum((part[name] for part in parts if name in part), Work()) for name in names}


def air_route(tokens, hidden, topk, sizes, num_live, num_used, element, prob_bytes=4):
    """``AIRRouter.route`` with a balancing loss.

    Forward: products of tokens with codewords and with their shortlists; bytes: tokens once per stage (there are two),
    the fp32 codebook, each row of a shortlist once per codeword that has tokens, expert ids and probs. Backward: the
    two products of the candidates' gradients; bytes: tokens read and their gradient written once, M rows per token or
    the rows of the lists as forward, whichever are fewer, and the gradient of each selected row written once.

    Args:
        sizes: the router's, C, L, P and M.
        num_live: codewords that have tokens.
        num_used: distinct experts that were selected.
        element: bytes of a number of tokens and weights.
        prob_bytes: bytes of a probability.
    Example: T = 2, H = 10, K = 1, C = 4, L = 3, P = 1, M = 2, 2 codewords live, 1 expert used, 4 bytes: forward
    2*2*10*(4+3) = 280 FLOPs and 2*2*40 + 4*40 + 2*3*40 + 2*8 = 576 bytes, backward 4*2*2*10 = 160 FLOPs and
    2*2*40 + 4*40 + 40 = 360 bytes.
    """
    row, pairs, listed = hidden * element, tokens * sizes.num_candidates, num_live * sizes.shortlist_size
    scored = sizes.num_clusters + sizes.num_probes * sizes.shortlist_size
    forward = 2 * tokens * row + sizes.num_clusters * hidden * _FP32_BYTES + listed * row
    return {
        "forward": Work(2 * tokens * hidden * scored, forward + tokens * topk * (_ID_BYTES + prob_bytes)),
        "backward": Work(4 * pairs * hidden, (2 * tokens + min(pairs, listed) + num_used) * row),
    }


def whitening(flops: float) -> dict[str, Work]:
    """Whitening the tokens and summing its statistics, from the FLOPs of all three products: other work reads the
    tokens."""
    return {"forward": Work(flops * 2 / 3), "backward": Work(flops / 3)}


def dense_maps(tokens, num_experts, prob_bytes=4):
    """Megatron's probs and routing map [T, E]: written once forward; the gradient of the probs read once backward."""
    numbers = tokens * num_experts
    return {"forward": Work(0, numbers * (prob_bytes + 1)), "backward": Work(0, numbers * prob_bytes)}


def topk_route(tokens, hidden, num_experts, element, prob_bytes=4):
    """``TopKRouter.forward``: tokens and centers once, and the dense maps; backward centers read and written once."""
    row = hidden * element
    products = {
        "forward": Work(2 * tokens * num_experts * hidden, (tokens + num_experts) * row),
        "backward": Work(4 * tokens * num_experts * hidden, 2 * num_experts * row),
    }
    return together(products, dense_maps(tokens, num_experts, prob_bytes))


def product_key_route(tokens, hidden, topk, num_heads, num_keys, key_size, element, prob_bytes=4):
    """``ProductKeyRouter``: tokens, query weights and keys once, ids and probs; backward weights and keys read and
    written once."""
    queries, keys = 2 * num_heads * key_size, 2 * num_heads * num_keys * key_size
    flops, weights = 2 * tokens * (hidden * queries + keys), (hidden * queries + keys) * element
    outputs = tokens * topk * (_ID_BYTES + prob_bytes)
    return {
        "forward": Work(flops, tokens * hidden * element + weights + outputs),
        "backward": Work(2 * flops, 2 * weights),
    }


def experts(tokens, hidden, topk, num_inputs, ffn, num_used, element):
    """Tiny experts: the product with the rows of the first projection, and with those of the second.

    Per direction, each product reads the rows of the K experts of each token once. If it is less, it reads one row per
    pair (its token) and the rows of the used experts once, as in a computation in the order of experts. Forward also
    reads tokens and writes sums once. Backward also writes each touched row of both projections once.

    Args:
        num_inputs: rows of the first projection, F or 2F with a gated linear unit.
        num_used: distinct experts that were selected.
    Example: T = 2, H = 10, K = 2, one row each, 3 experts used, 4 bytes: forward 2*4*2*10 = 160 FLOPs and 2*2*40 +
    2*4*40 = 480 bytes, backward 320 FLOPs and 2*4*40 + 3*2*40 = 560 bytes.
    """
    pairs, row = tokens * topk, hidden * element
    read = sum(min(pairs * rows, pairs + num_used * rows) for rows in (num_inputs, ffn)) * row
    flops = 2 * pairs * (num_inputs + ffn) * hidden
    return {
        "forward": Work(flops, 2 * tokens * row + read),
        "backward": Work(2 * flops, read + num_used * (num_inputs + ffn) * row),
    }


def dispatch(tokens, rows_received, hidden, element):
    """Dispatch and combine on one rank: tokens read and the rows received written once, the results of these rows read
    and the tokens' sums written once; backward the same. No arithmetic is counted."""
    work = Work(0, 2 * (tokens + rows_received) * hidden * element)
    return {"forward": work, "backward": work}


def codebook_update(num_clusters, hidden):
    """fp32 statistics read, running sums read and written, codewords written."""
    return {"total": Work(0, 4 * num_clusters * hidden * _FP32_BYTES)}


def rebuild(num_experts, hidden, num_clusters, shortlist_size, element, num_products=None):
    """Products of all codewords and centers, or ``num_products``; centers and codewords read, lists written once."""
    numbers = num_experts * hidden * element + num_clusters * (hidden * _FP32_BYTES + shortlist_size * _ID_BYTES)
    return {"total": Work(2 * (num_products or num_clusters * num_experts) * hidden, numbers)}


def transformer(tokens, hidden, num_layers, sequence, vocabulary):
    """Attention of every layer (half of the scores, as it is causal) and the output layer; no bytes are counted."""
    per_token = num_layers * (8 * hidden**2 + 2 * sequence * hidden) + 2 * hidden * vocabulary
    return {"forward": Work(tokens * per_token), "backward": Work(2 * tokens * per_token)}


def adam(num_parameters):
    """Every parameter's fp32 value and moments read and written once, its fp32 gradient read once."""
    return {"optimizer": Work(0, num_parameters * _ADAM_BYTES)}
