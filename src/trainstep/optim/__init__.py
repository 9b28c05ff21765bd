"""Optimizers as functions of (params, grads, opt_state, hyper)."""

from trainstep.optim.adam import adam as adam
from trainstep.optim.adam import adamw as adamw
from trainstep.optim.algebra import partition as partition
from trainstep.optim.base import Optimizer as Optimizer
from trainstep.optim.bridge import from_torch as from_torch
from trainstep.optim.sgd import sgd as sgd
