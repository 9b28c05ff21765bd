"""Which errors come from other processes, and what is said of them."""

from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from trainer.distributed import PeerFailure, Ranks, failure, reported

TWO = Ranks(rank=0, size=2, timeout=timedelta(seconds=7))

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] "


class Store(dict[str, bytes]):
    """What failure.py uses of the store of a process group."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def delete_key(self, key: str) -> None:
        self.pop(key, None)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    made = Store()
    monkeypatch.setattr(failure, "_store", lambda: made)
    monkeypatch.setattr(failure, "_telling", False)
    return made


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError(GLOO + "Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError(GLOO + "Read error: Connection reset by peer"), True),
        (RuntimeError("gloo: Timed out waiting 5000ms for recv operation"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (dist.DistBackendError("NCCL watchdog: collective operation timeout"), True),
        (dist.DistNetworkError("the client socket has failed"), True),
        (RuntimeError("a request to a service timed out"), False),
        (RuntimeError(GLOO + "invalid argument"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_errors_of_others_are_told_apart(error: Exception, lost: bool) -> None:
    assert failure.lost_contact(error) == lost


def test_an_error_of_ones_own_is_written_down(store: Store) -> None:
    with pytest.raises(KeyError), reported(TWO):
        raise KeyError("first line\nsecond line")
    assert list(store) == ["trainer/failed/0"]
    with reported(TWO):
        pass
    assert not store  # the script went on


def test_the_error_of_another_is_named(store: Store) -> None:
    store.set("trainer/failed/1", "ValueError: a bad sample")
    with (
        pytest.raises(PeerFailure, match=r"error on another process: process 1: ValueError: a bad"),
        reported(TWO),
    ):
        raise RuntimeError(GLOO + "Connection closed by peer")
    assert list(store) == ["trainer/failed/1"]


def test_silence_is_explained(store: Store) -> None:
    with (
        pytest.raises(
            PeerFailure, match=r"did not answer within ddp_timeout=7 s.*may have been kill"
        ),
        reported(TWO),
    ):
        raise RuntimeError(GLOO + "Connection closed by peer")


def test_a_store_that_is_gone_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> Any:
        raise dist.DistNetworkError("closed")

    monkeypatch.setattr(failure, "_store", gone)
    with pytest.raises(KeyError), reported(TWO):
        raise KeyError("x")
    monkeypatch.setattr(failure, "_telling", False)
    with pytest.raises(PeerFailure, match="did not answer"), reported(TWO):
        raise RuntimeError(GLOO + "Connection closed by peer")


def test_a_single_process_is_left_alone() -> None:
    error = RuntimeError(GLOO + "Connection closed by peer")
    with pytest.raises(RuntimeError) as raised, reported(Ranks()):
        raise error
    assert raised.value is error
