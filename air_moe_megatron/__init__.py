"""AIR-MoE on Megatron-Core: a two-stage inverted-index router for mixtures of very many tiny experts.

Importing this package has no side effect and needs neither Megatron nor CUDA; a public name loads what it needs when
it is first used.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "AIRMoEConfig": "config",
    "AIRMoELayer": "layer",
    "AIRRouter": "routers.air",
    "Routes": "routers.base",
    "air_layer_spec": "specs",
    "update_codebooks": "sync",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
