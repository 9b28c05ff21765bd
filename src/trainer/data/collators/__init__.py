"""Data collators: functions from a list of dataset rows to one batch.

The names, parameters, defaults and results are those of the collators of transformers 5.6.1, so
that an import can be swapped; transformers itself is never imported. Tokenizers are duck-typed:
whatever has ``pad``, ``padding_side``, ``pad_token_id`` and so on will do.

Two things differ on purpose. Collators that draw random numbers can be placed at a (seed,
position) and then give the same batch for the same place, whatever ran before (see
:mod:`trainer.data.collators.positioned`); and no collator changes the rows that it is given.
"""

from trainer.data.collators.base import DataCollator, DataCollatorMixin
from trainer.data.collators.default import DefaultDataCollator, default_data_collator
from trainer.data.collators.flattening import DataCollatorWithFlattening
from trainer.data.collators.language_modeling import (
    DataCollatorForLanguageModeling,
    DataCollatorForWholeWordMask,
)
from trainer.data.collators.multiple_choice import DataCollatorForMultipleChoice
from trainer.data.collators.padding import DataCollatorWithPadding
from trainer.data.collators.permutation import DataCollatorForPermutationLanguageModeling
from trainer.data.collators.positioned import PositionedCollator, RandomCollatorMixin
from trainer.data.collators.seq2seq import DataCollatorForSeq2Seq
from trainer.data.collators.sop import DataCollatorForSOP
from trainer.data.collators.token_classification import DataCollatorForTokenClassification

__all__ = [
    "DataCollator",
    "DataCollatorForLanguageModeling",
    "DataCollatorForMultipleChoice",
    "DataCollatorForPermutationLanguageModeling",
    "DataCollatorForSOP",
    "DataCollatorForSeq2Seq",
    "DataCollatorForTokenClassification",
    "DataCollatorForWholeWordMask",
    "DataCollatorMixin",
    "DataCollatorWithFlattening",
    "DataCollatorWithPadding",
    "DefaultDataCollator",
    "PositionedCollator",
    "RandomCollatorMixin",
    "default_data_collator",
]
