"""Learning rates as functions of the step.

A schedule maps a zero-based step to a learning rate; ``schedule(0)`` is the rate of the first update.
The first argument of every maker is the peak. Formulas are those of the Hugging Face schedulers, in
their order of operations, so the floats are the same. The two makers that follow a metric,
``reduce_on_plateau`` and ``greedy``, return pure reducers instead: ``init() -> state`` and
``update(state, metric) -> state``, with the rate in ``state.lr``.
"""

from trainstep.schedules.compose import join as join
from trainstep.schedules.compose import piecewise as piecewise
from trainstep.schedules.compose import warmup as warmup
from trainstep.schedules.cycle import one_cycle as one_cycle
from trainstep.schedules.decay import constant as constant
from trainstep.schedules.decay import cosine as cosine
from trainstep.schedules.decay import cosine_with_restarts as cosine_with_restarts
from trainstep.schedules.decay import inverse_sqrt as inverse_sqrt
from trainstep.schedules.decay import linear as linear
from trainstep.schedules.decay import polynomial as polynomial
from trainstep.schedules.floors import cosine_warmup_with_min_lr as cosine_warmup_with_min_lr
from trainstep.schedules.floors import cosine_with_min_lr as cosine_with_min_lr
from trainstep.schedules.greedy import Greedy as Greedy
from trainstep.schedules.greedy import GreedyState as GreedyState
from trainstep.schedules.greedy import greedy as greedy
from trainstep.schedules.plateau import Plateau as Plateau
from trainstep.schedules.plateau import PlateauState as PlateauState
from trainstep.schedules.plateau import reduce_on_plateau as reduce_on_plateau
from trainstep.schedules.stable import trapezoidal as trapezoidal
from trainstep.schedules.stable import warmup_stable_decay as warmup_stable_decay
