"""What a run will need, predicted before it is launched: ``python -m air_moe_megatron.plan``; see docs/tools.md.

``prediction.py`` has the formulas, ``text.py`` writes tables and finds layouts that fit, and ``command.py`` reads the
command line. All functions take what the parser of ``make_parser`` returns.
"""

from air_moe_megatron.plan.command import main, make_parser
from air_moe_megatron.plan.prediction import Collective, Plan, config_of, predict, rows_per_token, seconds
from air_moe_megatron.plan.text import report

__all__ = [
    "Collective",
    "Plan",
    "config_of",
    "main",
    "make_parser",
    "predict",
    "report",
    "rows_per_token",
    "seconds",
]
