"""Several processes that train one model: data parallelism, and sums with the same bits on any number."""

from trainer.distributed.control import Steering as Steering
from trainer.distributed.engines import make_engine as make_engine
from trainer.distributed.engines import sums_losses_later as sums_losses_later
from trainer.distributed.failure import PeerFailure as PeerFailure
from trainer.distributed.failure import reported as reported
from trainer.distributed.ranks import Ranks as Ranks
from trainer.distributed.ranks import ranks_of as ranks_of
from trainer.distributed.start import begin as begin
from trainer.distributed.start import same_plan as same_plan
from trainer.distributed.windows import Windows as Windows
