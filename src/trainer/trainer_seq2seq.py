"""Upstream's module of this name: ``Seq2SeqTrainer``."""

from trainer.seq2seq import Seq2SeqTrainer as Seq2SeqTrainer
