"""Upstream's module of this name: the same import with another first word."""

from trainer.arguments import OptimizerNames as OptimizerNames
from trainer.arguments import ParallelMode as ParallelMode
from trainer.arguments import TrainingArguments as TrainingArguments
