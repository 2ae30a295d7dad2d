"""What training leaves as it is: parameters by patterns of their names, and the statistics that belong to them.

    optim.freeze: [modality, "backbone.stages.0.[0-3].*"]      these are frozen
    optim.freeze: ["*", "!head.*"]                             all but the head: a linear probe. Later patterns win

A frozen parameter gets no gradient and is not in the optimiser, so neither weight decay nor momentum moves it. Where nothing before the head trains, no graph is kept of what comes before it.

What follows the data without a gradient would move all the same, so it is held with the weights that it belongs to: norms with running statistics (BatchNorm in a network of timm's) and the centroids of ``routing`` and
``clusterformer`` stay in evaluation mode while none of their weights trains; those that have none go by the module that they stand in. Dropout, drop path and noise stay what the recipe says, in frozen parts too:
set them to 0 where features are to be the same at every step.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from mmlong.models.lora import is_adapter, plain_name
from mmlong.models.patterns import matching, no_match

KEEP = "!"
"""Before a pattern: what it matches trains after all."""


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze parameters by their names, those of a model without adapters; adapters (:mod:`mmlong.models.lora`) always train.

    Args:
        model: changed in place.
        patterns: see :mod:`mmlong.models.patterns`, one after another; behind a ``!`` what they match trains.

    Raises:
        ValueError: a pattern matches nothing, with the nearest name; or nothing is left to train.
    """
    named = {plain_name(name): p for name, p in model.named_parameters() if not is_adapter(name)}
    for pattern in patterns:
        word = pattern.removeprefix(KEEP)
        names = matching(named, word, "optim.freeze")
        if not names:
            raise ValueError(no_match(named, word, "optim.freeze"))
        for name in names:
            named[name].requires_grad_(pattern.startswith(KEEP))
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"optim.freeze: {list(patterns)} leaves nothing to train")


def hold_statistics(model: nn.Module) -> None:
    """Put what keeps statistics into evaluation mode where the weights around it are frozen. To be called again whenever the model was put into training mode."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        running = isinstance(module, _NormBase) and module.track_running_stats
        if not running and not getattr(module, "keeps_statistics", False):
            continue
        around = module
        while name and next(around.parameters(), None) is None:
            name = name.rpartition(".")[0]
            around = modules[name]
        if not any(p.requires_grad for p in around.parameters()):
            # It alone: what stands in it, dropout say, keeps its mode.
            module.training = False
