"""trainstep: training as a pure function, ``state, metrics = step(state, batch)``, for PyTorch.

This file lists the public API; every name is documented where it is defined.
"""

from trainstep import collectives as collectives
from trainstep import optim as optim
from trainstep import rng as rng
from trainstep import schedules as schedules
from trainstep import serialize as serialize
from trainstep import transforms as transforms
from trainstep import tree as tree
from trainstep import vmap as vmap
from trainstep.chunked import linear_cross_entropy as linear_cross_entropy
from trainstep.compare import Difference as Difference
from trainstep.compare import diff as diff
from trainstep.compare import digest as digest
from trainstep.compare import equal as equal
from trainstep.curvature import NoiseScale as NoiseScale
from trainstep.curvature import gradient_noise_scale as gradient_noise_scale
from trainstep.curvature import hvp as hvp
from trainstep.curvature import microbatch_norms as microbatch_norms
from trainstep.errors import CaptureError as CaptureError
from trainstep.evaluate import EvalStep as EvalStep
from trainstep.evaluate import make_eval_step as make_eval_step
from trainstep.grads import accumulate as accumulate
from trainstep.grads import sum_gradients as sum_gradients
from trainstep.grads import value_and_grad as value_and_grad
from trainstep.guards import Guard as Guard
from trainstep.initial import init as init
from trainstep.losses import Loss as Loss
from trainstep.losses import module_loss as module_loss
from trainstep.lowering import capture as capture
from trainstep.lowering import compile as compile
from trainstep.lowering import donate as donate
from trainstep.making import make_step as make_step
from trainstep.model import functionalize as functionalize
from trainstep.optim.base import Optimizer as Optimizer
from trainstep.parallel import data_parallel as data_parallel
from trainstep.replay import Divergence as Divergence
from trainstep.replay import bisect as bisect
from trainstep.replay import leaf_digests as leaf_digests
from trainstep.replay import replay as replay
from trainstep.rng import Key as Key
from trainstep.scaling import DynamicScale as DynamicScale
from trainstep.scaling import unscale_ as unscale_
from trainstep.spikes import SpikeGuard as SpikeGuard
from trainstep.spikes import spike_guard as spike_guard
from trainstep.state import TrainState as TrainState
from trainstep.step import Step as Step
from trainstep.sums import Sums as Sums
from trainstep.transfer import load_into as load_into
from trainstep.transfer import to_device as to_device
from trainstep.transforms import Transform as Transform

__version__ = "0.1.0"
