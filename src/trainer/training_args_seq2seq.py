"""Upstream's module of this name: ``Seq2SeqTrainingArguments``."""

from trainer.arguments import Seq2SeqTrainingArguments as Seq2SeqTrainingArguments
