"""The routes of sharded routing by their former name, which ``inference/evaluation.py`` imports."""

from air_moe_megatron.routers.sharded import ShardedRoutes as ShardedRows

__all__ = ["ShardedRows"]
