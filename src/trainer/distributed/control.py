"""The switches by which callbacks steer training, the same on all processes.

Evaluations, checkpoints and the end of training need all processes. Callbacks run on each of them, and a
switch that is set on one is set on all before anybody acts on it. That takes a short message after every
step, but only if there are callbacks of the user's own: those that come with the trainer set the same
switches everywhere. A callback that does so as well can say so by an attribute
``same_on_all_ranks = True``, which saves the message.
"""

from typing import Any

from trainer.distributed import agree
from trainer.distributed.ranks import Ranks

_SWITCHES = (
    "should_training_stop",
    "should_epoch_stop",
    "should_save",
    "should_evaluate",
    "should_log",
)


class Steering:
    """Keeps the switches of one training the same on all processes.

    Args:
        callbacks: those of this process, when training begins. If they differ between processes, the
            message is sent by all as soon as one has a callback that needs it.
        ranks: the processes.
    """

    def __init__(self, callbacks: list[Any], ranks: Ranks) -> None:
        self._ranks = ranks
        own = any(not _alike(callback) for callback in callbacks)
        self._needed = ranks.many and agree.any_of(ranks, [own])[0]

    def settle(self, control: Any) -> None:
        """Set every switch of ``control`` that is set on some process."""
        if not self._needed:
            return
        flags = [bool(getattr(control, name)) for name in _SWITCHES]
        for name, flag in zip(_SWITCHES, agree.any_of(self._ranks, flags), strict=True):
            setattr(control, name, flag)


def _alike(callback: Any) -> bool:
    declared = getattr(callback, "same_on_all_ranks", None)
    if declared is not None:
        return bool(declared)
    return type(callback).__module__.partition(".")[0] == "trainer"
