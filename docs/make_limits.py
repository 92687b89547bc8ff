"""Writes docs/limits.md from the tables of refusals: `make limits`."""

from pathlib import Path

from air_moe_megatron.command.entry_refusals import FLAG_REFUSALS
from air_moe_megatron.config import CAUSES, REFUSALS

PAGE = Path(__file__).parent / "limits.md"

_INTRODUCTION = """# Limits

What cannot be combined is refused before training starts. The error names the field, its value and the reason.
`make limits` generates this page from [config/refusals.py](../air_moe_megatron/config/refusals.py) and
[entry_refusals.py](../air_moe_megatron/command/entry_refusals.py). Bounds of single values are in
[config/rules.py](../air_moe_megatron/config/rules.py).

A field of the config is a flag with dashes for underscores. Four have other names: `num_moe_experts` is
`--num-experts`, `fp8` and `fp4` are `--fp8-format` and `--fp4-format`, and `--disable-bias-linear` turns
`add_bias_linear` off. A row without a value refuses every value that turns the field on.
"""

_END = """
## Not refused, but limited
- With codebook source `experts` the lists come from an [E, C] matrix in memory. Beyond some 100,000 experts use source
  `tokens`.
- Megatron's own dispatchers hold process groups. So a layer with `--moe-dispatch stock` can be neither deep-copied nor
  pickled, and neither can a whole Megatron model. Routers, granular experts and layers with
  compact dispatch can.
- `torch.nn.parallel.DistributedDataParallel` and torch's `fully_shard` and `FullyShardedDataParallel` work around
  routers in a training loop of your own. The training entry refuses FSDP.
- NCCL between GPUs and Transformer Engine have not been tried. Everything was tested on CPU with gloo. The
  [README](../README.md) says what has also run on a GPU.
"""


def page() -> str:
    """The text of docs/limits.md."""
    parts = [_INTRODUCTION]
    for cause in CAUSES:
        parts.append(f"\n## {cause.title}\n| refused | reason |\n|---|---|\n")
        for row in REFUSALS:
            if row.cause is cause:
                shown = f" {row.values.shown}" if row.values.shown else ""
                parts.append(f"| `{row.field}`{shown} | {row.reason} |\n")
    parts.append("\n## The training entry, `python -m air_moe_megatron.pretrain`\n")
    parts.append("| flag | refused with | reason |\n|---|---|---|\n")
    names = {"router": "a layer of this package", "packed": "packed documents", "hash": "a hash router"}
    for row in FLAG_REFUSALS:
        parts.append(f"| `{row.flag}` | {row.cause.format(**names) or 'any run'} | {row.reason} |\n")
    return "".join(parts) + _END


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
