"""Gradient transformations: what happens to gradients between the loss and the optimizer.

Each is a pair of functions, as in optax: ``init(params) -> state`` and
``update(grads, state, params, context) -> (grads, state)``. ``make_step`` applies them in the order given.
"""

from trainstep.transforms.accumulation import accumulate_every as accumulate_every
from trainstep.transforms.base import Context as Context
from trainstep.transforms.base import Transform as Transform
from trainstep.transforms.base import Update as Update
from trainstep.transforms.clipping import adaptive_clip as adaptive_clip
from trainstep.transforms.clipping import clip_by_global_norm as clip_by_global_norm
from trainstep.transforms.clipping import clip_by_parameter_norm as clip_by_parameter_norm
from trainstep.transforms.clipping import clip_by_value as clip_by_value
from trainstep.transforms.compose import chain as chain
from trainstep.transforms.compose import identity as identity
from trainstep.transforms.shaping import add_noise as add_noise
from trainstep.transforms.shaping import centralize as centralize
from trainstep.transforms.shaping import scale_by_trust_ratio as scale_by_trust_ratio
from trainstep.transforms.shaping import zero_nonfinite as zero_nonfinite
