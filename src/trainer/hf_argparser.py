"""Upstream's module of this name: ``HfArgumentParser`` and ``HfArg``."""

from trainer.arguments import HfArg as HfArg
from trainer.arguments import HfArgumentParser as HfArgumentParser
