"""Randomness as a function of a key, never of how much was drawn before.

A ``Key`` is 64 bits. ``fold_in`` derives new keys from integers (step, micro-batch, sample), so any
draw can be repeated from its coordinates alone. ``seeded`` lends a key to code that draws from
PyTorch's global generators (``F.dropout`` takes no generator) and gives them back untouched.
"""

import threading
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from attrs import evolve, frozen

from trainstep.errors import CaptureError

_MASK = (1 << 64) - 1
_SPLIT = 0x73706C6974  # "split"

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
        branch = self.fold_in(_SPLIT)
        return tuple(branch.fold_in(i) for i in range(n))


@frozen
class SlotKey:
    """A key inside a recorded step: its value is not known yet, only how it derives from the root.

    What draws from it gets a generator from ``take``, a slot of the recording, that is seeded anew from the
    root's key before every replay.

    Attributes:
        take: path -> generator on the device of the recording.
        path: the integers folded in since the root.
    """

    take: Callable[[tuple[int, ...]], torch.Generator]
    path: tuple[int, ...] = ()

    def fold_in(self, *data: int) -> "SlotKey":
        """Derive a key; see ``Key.fold_in``."""
        return evolve(self, path=(*self.path, *map(int, data)))

    def split(self, n: int = 2) -> "tuple[SlotKey, ...]":
        """Derive ``n`` keys; see ``Key.split``."""
        branch = self.fold_in(_SPLIT)
        return tuple(branch.fold_in(i) for i in range(n))

    def slot(self) -> torch.Generator:
        """Return the generator that draws from this key."""
        return self.take(self.path)

    @property
    def bits(self) -> NoReturn:
        """Refuse: a number read now would be the same in every replay."""
        raise CaptureError(
            "the loss reads key.bits on the host, which a recorded step would never do again. Draw with "
            "trainstep.rng.generator(key, device) or inside trainstep.rng.seeded(key)."
        )


@frozen
class TracedKey:
    """A key inside a step that is being written down: only PyTorch's global generators draw from it.

    Whoever runs the written step seeds them, once, so everything in it draws from one stream.
    """

    def fold_in(self, *data: int) -> "TracedKey":
        """Return this key: there is one stream."""
        return self

    def split(self, n: int = 2) -> "tuple[TracedKey, ...]":
        """Return this key ``n`` times."""
        return (self,) * n

    @property
    def bits(self) -> NoReturn:
        """Refuse: a number read now would be the same in every step."""
        raise CaptureError(
            "a key is read on the host (trainstep.rng.generator, or key.bits), which a whole step that is "
            "compiled would never do again. Draw from PyTorch's global generators, as dropout does, inside "
            "trainstep.rng.seeded(key); or leave whole=True out."
        )


def key(seed: int) -> Key:
    """Make a key from any integer seed."""
    return Key(mix(int(seed) & _MASK))


def generator(key: Key, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh ``torch.Generator`` on ``device``, seeded from ``key``."""
    if isinstance(key, SlotKey):
        if torch.device(device).type != "cuda":
            raise CaptureError(
                f"random numbers are drawn on {device}, where a recorded step would never draw again. "
                "Draw them on the GPU."
            )
        return key.slot()
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
        self._saved: list[tuple[torch.Generator, Any]] = []

    def __enter__(self) -> "seeded":
        _turn.acquire()
        if isinstance(self._key, TracedKey):
            return self
        try:
            for gen in default_generators(self._devices):
                if not isinstance(self._key, SlotKey):
                    self._saved.append((gen, gen.get_state()))
                    gen.manual_seed(self._key.bits)
                elif gen.device.type == "cuda":  # seeding is not allowed while recording
                    self._saved.append((gen, gen.graphsafe_get_state()))
                    gen.graphsafe_set_state(self._key.slot())
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
                if isinstance(state, torch.Generator):
                    gen.graphsafe_set_state(state)
                else:
                    gen.set_state(state)
        finally:
            _turn.release()
