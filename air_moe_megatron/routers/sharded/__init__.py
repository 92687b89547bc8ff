"""Sharded routing: each expert-parallel rank holds the centers and the parts of the lists of its own experts.

A token's *home* is the rank that it comes from. An expert's *owner* is the rank that holds its center and its slots in
the lists, and rebuilds these slots. The home does all work per token: coarse stage, selection, probabilities, losses. A
forward over the D expert-parallel ranks:

1. Each home finds its tokens' codewords. Rows and codewords go to all ranks (all-gathers).
2. Each owner scores its parts of the lists, and offers the best candidates of every row. It also draws its share of the
   explored candidates from its parts.
3. Scores and ids of these n offers return to the homes (all-to-alls). The home chooses the best M of all owners' offers
   as candidates, and the top-k of these.
4. The owners learn which offers were kept and selected (an all-to-all of bytes). The dispatcher sends the probs.

For any D the candidates are those of a replicated router whose lists have as many parts. The files, each of which uses
those above it:

    exchange.py    the collectives that move rows of tokens to all ranks, and values of rows back home
    pairs.py       pairs of tokens and candidates at homes and owners, and the gradients of their scores
    candidates.py  what a forward holds between two steps: rows, offers, candidates
    router.py      the router and its routes

Legend: D ranks, T tokens of this rank, R rows (the tokens of all ranks), n offers per row and owner, N candidates per
token, p pairs of this home, q pairs of this owner; others as in ``ops/__init__.py``.
"""

from air_moe_megatron.routers.sharded.router import ShardedAIRRouter, ShardedRoutes

__all__ = ["ShardedAIRRouter", "ShardedRoutes"]
