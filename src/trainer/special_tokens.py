"""Making a model's special tokens those of its tokenizer."""

import logging
from typing import Any

from trainer import modeling

logger = logging.getLogger(__name__)

NAMES = ("eos_token_id", "bos_token_id", "pad_token_id")


def align_special_tokens(model: Any, processing_class: Any) -> dict[str, int | None]:
    """Copy the ids of EOS, BOS and PAD from the tokenizer into the model's configurations.

    Fine-tuning may give a tokenizer new ones (an end of turn, say), which generation and padding must
    know. ``model.config`` and ``model.generation_config`` get the tokenizer's ids where either differs,
    None included; the generation's EOS becomes a list that begins with the tokenizer's and keeps those
    it had, each of which still ends a text. Changes are warned of.

    Args:
        model: any module; without a ``config`` nothing happens.
        processing_class: a tokenizer, a processor that has one as ``tokenizer``, or anything else, which
            has no say. The same goes for an id that it has no attribute for.

    Returns:
        The tokenizer's ids that were copied, by name.
    """
    model = modeling.unwrap(model)
    config = getattr(model, "config", None)
    if config is None or isinstance(config, dict):
        return {}
    if not any(hasattr(processing_class, name) for name in NAMES):
        processing_class = getattr(processing_class, "tokenizer", None)
    generation = getattr(model, "generation_config", None)
    changes: dict[str, int | None] = {}
    for name in NAMES:
        if not hasattr(processing_class, name):
            continue
        token = getattr(processing_class, name)
        if token == getattr(config, name, None) and _agrees(generation, name, token):
            continue
        changes[name] = token
        setattr(config, name, token)
        if generation is not None:
            listed = name == "eos_token_id"
            setattr(generation, name, _first(token, generation) if listed else token)
    if changes:
        logger.warning(
            "The tokenizer's special tokens differ from those of the model; its config and "
            "generation_config now have the tokenizer's: %s",
            ", ".join(f"{name}={token}" for name, token in changes.items()),
        )
    return changes


def _agrees(generation: Any, name: str, token: int | None) -> bool:
    if generation is None:
        return True
    present = getattr(generation, name, None)
    return token in present if isinstance(present, list | tuple) else token == present


def _first(token: int | None, generation: Any) -> list[int]:
    """Return the EOS ids of ``generation`` with ``token`` in front, each once and no None."""
    present = getattr(generation, "eos_token_id", None)
    others = present if isinstance(present, list | tuple) else [present]
    return [number for number in dict.fromkeys([token, *others]) if number is not None]
