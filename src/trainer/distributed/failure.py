"""What becomes of a run when one of its processes fails.

A process that raises writes down why, where the others can read it, and goes its way: uncaught, the error
ends the process, and the launcher ends the others. Those meanwhile wait for it in an operation that
needs all of them. Over gloo that fails as soon as the process is gone; in any case after ``ddp_timeout``.
They then raise ``PeerFailure``, which names the process and its error.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from trainer.distributed.ranks import Ranks

logger = logging.getLogger(__name__)

_KEY = "trainer/failed"

# What backends say when another process is gone or does not answer.
_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "Timed out",
    "timed out",
    "Timeout",
    "timeout",
    "Application timeout",
    "remote process has terminated",
)


class PeerFailure(RuntimeError):
    """Training cannot go on because another process failed, was killed, or does not answer."""


@contextmanager
def reported(ranks: Ranks) -> Iterator[None]:
    """Tell other processes of an error inside, and raise ``PeerFailure`` for one that came from them."""
    if ranks.many:
        _forget(ranks)
    try:
        yield
    except Exception as error:
        if not ranks.many:
            raise
        if not lost_contact(error):
            _tell(ranks, error)
            raise
        raise PeerFailure(_explain(ranks)) from error


def lost_contact(error: BaseException) -> bool:
    """Tell whether an error says that another process did not take part in an operation."""
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, PeerFailure):
        return False
    text = str(error)
    # Gloo names itself in most of its errors: not where it closes a connection that took too long.
    gloo = "gloo" in text.lower() or "pair closure" in text
    communicating = isinstance(error, dist.DistBackendError) or gloo
    return communicating and any(sign in text for sign in _SIGNS)


def _explain(ranks: Ranks) -> str:
    found = _told(ranks)
    if found:
        return "training ends because of an error on another process: " + "; ".join(
            f"process {rank}: {text}" for rank, text in found
        )
    return (
        "training ends because another process is gone or did not answer within "
        f"ddp_timeout={int(ranks.timeout.total_seconds())} s; see its output. It may have been killed, for "
        "want of memory say. If it only needed longer (to load data, or to save), set a longer "
        "ddp_timeout."
    )


def _store() -> Any:
    return distributed_c10d._get_default_store()


_telling = False


def _forget(ranks: Ranks) -> None:
    """Take back the error of an earlier training that the script went on after."""
    global _telling
    if _telling:
        _store().delete_key(f"{_KEY}/{ranks.rank}")
        _telling = False


def _tell(ranks: Ranks, error: Exception) -> None:
    global _telling
    lines = str(error).splitlines() or [""]
    _telling = True
    try:
        _store().set(f"{_KEY}/{ranks.rank}", f"{type(error).__name__}: {lines[0]}")
    except Exception as refused:  # the one that keeps it may be gone already
        logger.debug("Process %d could not tell of its error: %s", ranks.rank, refused)


def _told(ranks: Ranks) -> list[tuple[int, str]]:
    """Return the errors that other processes wrote down, by rank; none if that cannot be read."""
    found: list[tuple[int, str]] = []
    try:
        store = _store()
        for rank in range(ranks.size):
            key = f"{_KEY}/{rank}"
            if rank != ranks.rank and store.check([key]):
                found.append((rank, store.get(key).decode()))
    except Exception as refused:
        logger.debug("Errors of other processes cannot be read: %s", refused)
    return found
