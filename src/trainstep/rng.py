"""Randomness as a function of a key, never of how much was drawn before.

A ``Key`` is 64 bits. ``fold_in`` derives new keys from integers (step, micro-batch, sample), so any
draw can be repeated from its coordinates alone. ``seeded`` lends a key to code that draws from
PyTorch's global generators (``F.dropout`` takes no generator) and gives them back untouched.
"""

import threading
from collections.abc import Iterable
from typing import Any

import torch
from attrs import frozen

_MASK = (1 << 64) - 1

_turn = threading.RLock()  # the global generators belong to the whole process


def mix(value: Any) -> Any:
    """Scramble 64 bits: the output of SplitMix64 (Steele, Lea and Flood, 2014) from state ``value``.

    A bijection of the integers below ``2**64``; also takes a NumPy array of uint64.
    """
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


@frozen
class Key:
    """A 64-bit random key. Equal keys give equal draws.

    Attributes:
        bits: the key, ``0 <= bits < 2**64``.
    """

    bits: int

    def fold_in(self, *data: int) -> "Key":
        """Derive a key from integers; the order matters: ``fold_in(a, b)``, not ``fold_in(b, a)``."""
        bits = self.bits
        for value in data:
            # The inner mix keeps (key a, value b) apart from (key b, value a).
            bits = mix(mix(bits) ^ (int(value) & _MASK))
        return Key(bits)

    def split(self, n: int = 2) -> "tuple[Key, ...]":
        """Derive ``n`` keys that differ from one another and from ``fold_in`` of small integers."""
        if n < 1:
            raise ValueError(f"Key.split: n must be at least 1, got {n}")
        branch = self.fold_in(0x73706C6974)  # "split"
        return tuple(branch.fold_in(i) for i in range(n))


def key(seed: int) -> Key:
    """Make a key from any integer seed."""
    return Key(mix(int(seed) & _MASK))


def generator(key: Key, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh ``torch.Generator`` on ``device``, seeded from ``key``."""
    return torch.Generator(device=device).manual_seed(key.bits)


def default_generators(devices: Iterable[torch.device] = ()) -> list[torch.Generator]:
    """Return the global generators that code running on ``devices`` may draw from.

    The CPU's is always among them. The objects themselves are used, rather than
    ``torch.manual_seed`` or ``fork_rng``, because those walk over every backend.
    """
    found = [torch.default_generator]
    for device in set(devices):
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            found.append(torch.cuda.default_generators[index])
        elif device.type == "mps":
            found.append(torch.mps._get_default_mps_generator())
        elif device.type == "xpu":
            index = torch.xpu.current_device() if device.index is None else device.index
            found.append(torch.xpu.default_generators[index])
    return found


class seeded:
    """Context manager: PyTorch's global generators are seeded from ``key`` inside, restored after.

    Args:
        key: what to seed with. The CPU generator (a Mersenne twister) uses the low 32 bits.
        devices: devices whose generators the code inside may use, besides the CPU's.

    Threads take turns, because the generators are those of the whole process. Python's ``random`` and
    NumPy are left alone: a loss that draws from them is not pure.
    """

    __slots__ = ("_devices", "_key", "_saved")

    def __init__(self, key: Key, devices: Iterable[torch.device] = ()) -> None:
        self._key = key
        self._devices = devices
        self._saved: list[tuple[torch.Generator, torch.Tensor]] = []

    def __enter__(self) -> "seeded":
        _turn.acquire()
        try:
            for gen in default_generators(self._devices):
                self._saved.append((gen, gen.get_state()))
                gen.manual_seed(self._key.bits)
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(self, *exc: Any) -> None:
        self._restore()

    def _restore(self) -> None:
        try:
            while self._saved:
                gen, state = self._saved.pop()
                gen.set_state(state)
        finally:
            _turn.release()
