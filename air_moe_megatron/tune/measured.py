"""All that a run of ``tune`` has measured, from which table, CSV file and plot are made."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.tune.recall import Layer
from air_moe_megatron.tune.search import Result, Search, best, cheapest, flops_of, of_type


@dataclass(frozen=True)
class Measured:
    """All that was measured on a checkpoint, and what for."""

    config: TransformerConfig
    layers: Sequence[Layer]
    tokens_per_batch: int  # tokens of a global batch
    target: float  # recall to reach
    metric: str  # of the recall: "topk" or "mass"
    found: Search  # settings of AIR
    loaded: Sequence[Result]  # the checkpoint's own lists
    others: Sequence[Result]  # groups and product keys

    @property
    def results(self) -> list[Result]:
        """All results."""
        return [*self.found.results, *self.loaded, *self.others]

    @property
    def exact_flops(self) -> float:
        """FLOPs per token of an exact router."""
        return flops_of(of_type(self.config, "topk"))

    @property
    def chosen(self) -> Result | None:
        """The cheapest setting that reaches the target; None if there is none."""
        return cheapest(self.found.results, self.target, self.metric)

    @property
    def shown(self) -> Result:
        """The chosen setting, or else the one with the highest recall."""
        return self.chosen or best(self.found.results, self.metric)

    @property
    def worst_layer(self) -> Layer:
        """The layer in which the shown setting has its lowest recall."""
        recalls = self.shown.recalls(self.metric)
        return self.layers[recalls.index(min(recalls))]
