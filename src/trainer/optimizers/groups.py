"""Parameter groups: which parameters are decayed."""

import re
from typing import Any

from torch import nn

# A name that matches is not decayed; tested against the lower-cased dotted name.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def decay_parameter_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters that weight decay applies to.

    Left out are all parameters of ``nn.LayerNorm`` modules, and those whose name says bias or norm.
    """
    inside_norm = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters(recurse=False)
    }
    return [
        name
        for name, _ in model.named_parameters()
        if name not in inside_norm and not _NO_DECAY.search(name.lower())
    ]


def parameter_groups(model: nn.Module, decayed: set[str], decay: float) -> list[dict[str, Any]]:
    """Return a decayed and an undecayed group of the trainable parameters, for a torch optimizer."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if name in decayed], "weight_decay": decay},
        {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
    ]
