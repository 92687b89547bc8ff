"""Floating-point operations of a router, from its config alone; each router class has its own formula.

Products of vectors are counted, forward and backward, of one layer and token. A multiplication and an addition are two
operations. What is linear in the scores is not counted: softmax, top-k, sorting, norms, statistics of the codebook.
``tests/unit/test_router_flops.py`` compares the formulas with the operations that torch counts while the routers run.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RouterFlops:
    """Operations per token of one router."""

    forward: float
    backward: float
    refresh: float = 0.0  # AIR's rebuilding of the shortlists, spread over all tokens

    @property
    def total(self) -> float:
        """Forward, backward and refresh."""
        return self.forward + self.backward + self.refresh
