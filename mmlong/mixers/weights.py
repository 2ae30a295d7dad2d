"""A module's parameters as the module uses them.

torch's parametrizations (the adapters of :mod:`mmlong.models.lora`, a weight norm) put a function of other parameters, with other names, in the place of a weight. Whoever reads the
attribute sees the weight; a mixer that hands its parameters on by name, or asks whether they have changed, asks here.
"""

from __future__ import annotations

from torch import Tensor, nn

INSIDE = "parametrizations."
"""What torch puts into the names of parameters that a weight is made of."""


def named_weights(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter by its own name; one that is made of others as it is made, with its graph, once."""
    found: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        owner, inside, rest = name.rpartition(INSIDE)
        if not inside:
            found[name] = parameter
            continue
        tensor = rest.partition(".")[0]
        if owner + tensor not in found:
            found[owner + tensor] = getattr(module.get_submodule(owner.removesuffix(".")), tensor)
    return found


def written(module: nn.Module) -> int:
    """How many times the parameters of a module have been written to, all together: another number where one was, except through ``.data``."""
    return sum(parameter._version for parameter in module.parameters())
