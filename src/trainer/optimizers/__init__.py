"""Optimizers and schedulers of the shell: PyTorch's objects outside, pure functions inside."""

from trainer.optimizers.adopt import Adopted as Adopted
from trainer.optimizers.adopt import adopt as adopt
from trainer.optimizers.adopt import carried as carried
from trainer.optimizers.build import build_optimizer as build_optimizer
from trainer.optimizers.fused import refuse_scaling as refuse_scaling
from trainer.optimizers.groups import decay_parameter_names as decay_parameter_names
from trainer.optimizers.groups import parameter_groups as parameter_groups
from trainer.optimizers.layerwise import LayerwiseOptimizer as LayerwiseOptimizer
from trainer.optimizers.names import check_optimizer as check_optimizer
from trainer.optimizers.names import optimizer_class_and_kwargs as optimizer_class_and_kwargs
from trainer.optimizers.rates import Rates as Rates
from trainer.optimizers.schedulers import make_scheduler as make_scheduler
from trainer.optimizers.schedulers import multiplier as multiplier
from trainer.optimizers.unfrozen import Unfrozen as Unfrozen
