"""The search for modules of a class in a model."""

from collections.abc import Iterable

import torch


def find_modules[M: torch.nn.Module](
    modules: torch.nn.Module | Iterable[torch.nn.Module], module_class: type[M]
) -> list[M]:
    """Find all modules of a class in a fixed order, each once.

    Args:
        modules: a module, or several, such as Megatron's model chunks.
        module_class: the class to find; its subclasses are found too.
    """
    chunks = [modules] if isinstance(modules, torch.nn.Module) else modules
    found = dict.fromkeys(module for chunk in chunks for module in chunk.modules())
    return [module for module in found if isinstance(module, module_class)]
