"""``Seq2SeqTrainingArguments``: arguments for models that generate."""

# ruff: noqa: RUF009 (``option`` returns a ``dataclasses.field``)

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import TrainingArguments
from .fields.option import option


@dataclass(repr=False)
class Seq2SeqTrainingArguments(TrainingArguments):
    """Training arguments, and how to generate in evaluation and prediction.

    ``generation_config`` may be the dict that :meth:`to_dict` makes of a configuration object.
    """

    sortish_sampler: bool = option(
        False, "Kept for old scripts, without effect; see train_sampling_strategy."
    )
    predict_with_generate: bool = option(
        False, "Generate in evaluation and prediction, so that metrics see the generated tokens."
    )
    generation_max_length: int | None = option(
        None, "Length of generated sequences, unless the call gives max_length or max_new_tokens."
    )
    generation_num_beams: int | None = option(
        None, "Beams of generation, unless the call gives num_beams."
    )
    generation_config: str | Path | dict[str, Any] | Any | None = option(
        None, "Generation settings: a GenerationConfig, a repository name, a folder or a file."
    )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, a configuration object as a dict."""
        values = super().to_dict()
        config = values["generation_config"]
        if hasattr(config, "to_dict"):
            values["generation_config"] = config.to_dict()
        elif isinstance(config, Path):
            values["generation_config"] = str(config)
        return values
