"""``functionalize``: call a module with tensors that are given, instead of those that it holds.

The entries of every submodule's ``_parameters`` and ``_buffers`` dicts are exchanged for the call and
put back afterwards. That runs at the speed of the plain module; ``torch.func.functional_call`` was up
to six times slower on a small model.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trainstep.types import Buffers, Params

Slot = tuple[Any, Any]
"""A container and the key in it under which the module looks a tensor up."""

_local = threading.local()
_locks: "WeakKeyDictionary[nn.Module, threading.RLock]" = WeakKeyDictionary()
_locks_guard = threading.Lock()


def functionalize(
    module: nn.Module, *, copy: bool = True
) -> tuple[Callable[..., tuple[Any, Buffers]], Params, Buffers]:
    """Split a module into a pure function and its tensors.

    Args:
        module: any module. It is not changed, neither now nor by later calls.
        copy: give detached copies of the tensors; with False, detached views of the module's own.

    Returns:
        ``(apply, params, buffers)``. ``params`` holds the parameters with ``requires_grad``, tied
        weights under their first name. ``buffers`` holds everything else: buffers, persistent or not,
        and frozen parameters. ``apply(params, buffers, *args, train=True, **kwargs)`` returns
        ``(output, buffers)``, the buffers as the call left them (running statistics, say).

    ``apply`` raises ValueError if names are missing or unexpected. Threads that call the same module
    take turns. Randomness inside the module comes from PyTorch's global generators; see
    ``trainstep.rng.seeded``.
    """
    call = Functional(module)
    return call, call.params(copy=copy), call.buffers(copy=copy)


class Functional:
    """A module as a pure function of its tensors; what ``functionalize`` returns as ``apply``."""

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"functionalize: expected a torch.nn.Module, got {type(module).__name__}"
            )
        self.module = module
        self._slots = _find_slots(module)
        self._trainable = tuple(n for n, p in module.named_parameters() if p.requires_grad)
        self._frozen = tuple(n for n, p in module.named_parameters() if not p.requires_grad)
        self._stateful = tuple(name for name, _ in module.named_buffers())
        self._constant = frozenset(self._frozen)
        self._scratch = _scratch(module)
        self._recurrent = [m for m in module.modules() if isinstance(m, nn.RNNBase)]

    def params(self, *, copy: bool = True) -> Params:
        """Return the module's current trainable parameters, detached."""
        return {name: self._read(name, copy) for name in self._trainable}

    def buffers(self, *, copy: bool = True) -> Buffers:
        """Return the module's current buffers and frozen parameters, detached."""
        return {name: self._read(name, copy) for name in (*self._stateful, *self._frozen)}

    def __call__(
        self,
        params: Params,
        buffers: Buffers,
        *args: Any,
        train: bool = True,
        donate_buffers: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Buffers]:
        """Run the module; see ``functionalize``. ``donate_buffers`` lets it write into ``buffers``."""

        def run() -> Any:
            return self.module(*args, **kwargs)

        return self.run(run, params, buffers, train=train, donate_buffers=donate_buffers)

    def run(
        self,
        run: Callable[[], Any],
        params: Params,
        buffers: Buffers,
        *,
        train: bool = True,
        donate_buffers: bool = False,
    ) -> tuple[Any, Buffers]:
        """Return what ``run()`` does, and the buffers, while the module holds the given tensors."""
        if not donate_buffers and self._stateful:
            buffers = {n: b if n in self._constant else b.clone() for n, b in buffers.items()}
        lock = _lock_of(self.module)
        lock.acquire()
        undo: list[Callable[[], Any]] = [lock.release]
        running = _running()
        running.append(self.module)
        try:
            self._exchange(params, buffers, undo)
            self._set_mode(train, undo)
            output = run()
            if self._stateful:
                buffers = {
                    n: b if n in self._constant else self._current(n).detach()
                    for n, b in buffers.items()
                }
            return output, buffers
        finally:
            running.pop()
            _put_back(self.module, undo, running)

    def _exchange(self, params: Params, buffers: Buffers, undo: list[Callable[[], Any]]) -> None:
        slots = self._slots
        if len(params) != len(self._trainable) or len(buffers) != len(slots) - len(params):
            raise ValueError(self._describe_mismatch(params, buffers))
        old: list[tuple[Any, Any, Any]] = [(d, k, d[k]) for d, k in self._scratch]
        undo.append(lambda: _write(old))
        for rnn in self._recurrent:  # hooks write into this list, see _scratch
            rnn.__dict__["_flat_weights"] = list(rnn._flat_weights)
        for given in (params, buffers):
            for name, tensor in given.items():
                if name not in slots:
                    raise ValueError(self._describe_mismatch(params, buffers))
                for container, key in slots[name]:
                    old.append((container, key, container[key]))
                    container[key] = tensor

    def _set_mode(self, train: bool, undo: list[Callable[[], Any]]) -> None:
        # Only the root's flag is compared: a submodule that its owner keeps in another mode stays so.
        if self.module.training == train:
            return
        modes = [(m, m.training) for m in self.module.modules()]

        def restore() -> None:
            for submodule, mode in modes:
                submodule.training = mode

        undo.append(restore)
        self.module.train(train)

    def _current(self, name: str) -> Tensor:
        container, key = self._slots[name][0]
        tensor: Tensor = container[key]
        return tensor

    def _read(self, name: str, copy: bool) -> Tensor:
        tensor = self._current(name).detach()
        return tensor.clone(memory_format=torch.preserve_format) if copy else tensor

    def _describe_mismatch(self, params: Params, buffers: Buffers) -> str:
        lines = [f"functionalize: tensors do not fit {type(self.module).__name__}."]
        expected_buffers = (*self._stateful, *self._frozen)
        for what, given, wanted in (
            ("params", params, self._trainable),
            ("buffers", buffers, expected_buffers),
        ):
            missing = [n for n in wanted if n not in given]
            extra = [n for n in given if n not in wanted]
            if missing:
                lines.append(f"{what} missing: {', '.join(missing[:8])}.")
            if extra:
                lines.append(f"{what} unexpected: {', '.join(extra[:8])}.")
        lines.append("Pass the dicts that functionalize() returned, with the same names.")
        return " ".join(lines)


@contextmanager
def held() -> Iterator[None]:
    """Keep the tensors of the first call of each module in place until the block ends.

    Backward passes need this: gradient checkpointing runs parts of ``forward`` again, and must find
    the parameters that were given, not the module's own.
    """
    outer = getattr(_local, "scope", None)
    scope: dict[nn.Module, list[Callable[[], Any]]] = {}
    _local.scope = scope
    try:
        yield
    finally:
        _local.scope = outer
        for undo in reversed(list(scope.values())):
            _run(undo)


def _running() -> list[nn.Module]:
    """Return the modules whose calls are under way in this thread, outermost first."""
    if not hasattr(_local, "running"):
        _local.running = []
    running: list[nn.Module] = _local.running
    return running


def _put_back(module: nn.Module, undo: list[Callable[[], Any]], outer: list[nn.Module]) -> None:
    scope = getattr(_local, "scope", None)
    # A call from inside the forward of a module that it is part of: the rest of that forward must
    # find its own tensors again, so this one cannot wait for the end of the scope.
    within = outer and any(module is part for other in outer for part in other.modules())
    if scope is None or module in scope or within:
        _run(undo)
    else:
        scope[module] = undo


def _run(undo: list[Callable[[], Any]]) -> None:
    while undo:
        undo.pop()()


def _write(entries: list[tuple[Any, Any, Any]]) -> None:
    for container, key, value in reversed(entries):
        container[key] = value


def _find_slots(module: nn.Module) -> dict[str, list[Slot]]:
    """Map each distinct tensor's first name to every place that holds it."""
    names: dict[int, str] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        names.setdefault(id(tensor), name)
    slots: dict[str, list[Slot]] = {name: [] for name in names.values()}
    for submodule in module.modules():
        for container in (submodule._parameters, submodule._buffers):
            for key, held_tensor in container.items():
                if held_tensor is not None:
                    slots[names[id(held_tensor)]].append((container, key))
    return slots


def _scratch(module: nn.Module) -> list[Slot]:
    """Find attributes that a call overwrites although they are neither parameters nor buffers.

    These are tensors kept as plain attributes (the hook of weight_norm sets one), and the lists of
    weights that recurrent modules derive again when they see other parameters.
    """
    slots: list[Slot] = []
    for submodule in module.modules():
        kept = submodule.__dict__
        slots += [(kept, name) for name, value in kept.items() if isinstance(value, Tensor)]
        if isinstance(submodule, nn.RNNBase):
            slots += [(kept, "_flat_weights"), (kept, "_flat_weight_refs")]
    return slots


def _lock_of(module: nn.Module) -> "threading.RLock":
    lock = _locks.get(module)
    if lock is None:
        with _locks_guard:
            lock = _locks.setdefault(module, threading.RLock())
    return lock
