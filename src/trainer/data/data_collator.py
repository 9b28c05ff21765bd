"""Upstream's module of this name: ``from transformers.data.data_collator import ...``."""

from trainer.data.collators import *  # noqa: F403 - the names are those of ``__all__`` there
