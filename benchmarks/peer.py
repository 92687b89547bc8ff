"""The PEER baseline: a layer of tiny experts found by product keys, after its paper and its public code.

Source: He, "Mixture of A Million Experts", arXiv 2407.04153 (PEER). The einsums and embedding gathers follow the public
PyTorch implementation. Scores compete (a softmax over the K experts of a head), as in the paper; that code leaves this
off by default. As in that code, each head has its own keys, while the paper's heads share one set, and queries are not
batch-normalized, which saves work.

Legend: T tokens, H hidden, E experts, N = sqrt(E) keys per half, K experts per head, D key size.
"""

import torch


class ProductKeyRouter(torch.nn.Module):
    """The best experts of a token by product keys: PEER's router alone.

    Args:
        hidden_size: H.
        num_experts: E, a square.
        num_heads: heads, each of which retrieves its own experts.
        topk_per_head: K; a token uses ``num_heads * K`` experts.
        key_size: D of each half.
    """

    def __init__(self, hidden_size: int, num_experts: int, num_heads: int, topk_per_head: int, key_size: int):
        super().__init__()
        self.num_keys = round(num_experts**0.5)
        if self.num_keys**2 != num_experts:
            raise ValueError(f"num_experts ({num_experts}) must be a square")
        self.num_heads, self.topk, self.key_size = num_heads, topk_per_head, key_size
        self.queries = torch.nn.Linear(hidden_size, 2 * num_heads * key_size, bias=False)
        self.keys = torch.nn.Parameter(torch.randn(num_heads, self.num_keys, 2, key_size) * 0.02)

    def route(self, hidden: torch.Tensor):
        """Experts [T, heads, K] and their scores, the best of all N * N products of the two halves' top-k."""
        queries = self.queries(hidden).view(-1, 2, self.num_heads, self.key_size)  # [T, 2, heads, D]
        scores = torch.einsum("tphd,hnpd->pthn", queries, self.keys)
        (scores_x, scores_y), (ids_x, ids_y) = scores.topk(self.topk, dim=-1)
        scores = (scores_x.unsqueeze(-1) + scores_y.unsqueeze(-2)).flatten(-2)
        ids = (ids_x.unsqueeze(-1) * self.num_keys + ids_y.unsqueeze(-2)).flatten(-2)
        scores, positions = scores.topk(self.topk, dim=-1)
        return ids.gather(-1, positions), scores

    def forward(self, hidden: torch.Tensor):
        """Experts and their probs, [T, heads, K] both."""
        ids, scores = self.route(hidden.reshape(-1, hidden.shape[-1]))
        return ids, scores.softmax(dim=-1)


class PEERLayer(ProductKeyRouter):
    """``y_t = sum over heads and their top-k experts of p * gelu(<w_down, x>) * w_up``; arguments as of its router."""

    def __init__(self, hidden_size: int, num_experts: int, num_heads: int, topk_per_head: int, key_size: int):
        super().__init__(hidden_size, num_experts, num_heads, topk_per_head, key_size)
        self.down = torch.nn.Embedding(num_experts, hidden_size)
        self.up = torch.nn.Embedding(num_experts, hidden_size)
        for embedding in (self.down, self.up):
            torch.nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        ids, probs = super().forward(flat)
        down, up = self.down(ids), self.up(ids)  # [T, heads, K, H] each
        values = torch.nn.functional.gelu(torch.einsum("th,tnkh->tnk", flat, down)) * probs
        return torch.einsum("tnk,tnkh->th", values, up).view_as(hidden)
