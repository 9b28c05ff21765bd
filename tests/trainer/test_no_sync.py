"""Between two logs nothing is read from the device: the host never waits for a step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from support.shell import Recorder, logged, make_trainer, samples, scored
from trainer import TrainerCallback

READ = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class Sync(AssertionError):
    """A number was read from the device."""


class Guard(TorchDispatchMode):
    """Refuses, while ``armed``, what would wait for a device: reading numbers, and copies to the host.

    On the CPU these take no time, so they are recognised by the operation. Integers are let through:
    seeds, positions and counts of tokens are on the host anyhow.
    """

    armed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.armed and func in READ and args[0].dtype is not torch.int64:
            raise Sync(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A guard under which the test runs; methods that do not dispatch are refused for real numbers."""
    with Guard() as mode:
        for name in ("tolist", "numpy", "cpu"):
            original = getattr(Tensor, name)

            def read(self: Tensor, *given: Any, _original: Any = original, **options: Any) -> Any:
                if mode.armed and self.is_floating_point():
                    raise Sync(_original.__name__)
                return _original(self, *given, **options)

            monkeypatch.setattr(Tensor, name, read)
        yield mode


class Arming(TrainerCallback):
    """Arms the guard when training begins, and disarms it from the step that logs until it has."""

    def __init__(self, guard: Guard, every: int) -> None:
        self.guard, self.every, self.seen = guard, every, 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.guard.armed = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen += self.guard.armed
        self.guard.armed = not control.should_log and state.global_step < state.max_steps

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self.guard.armed = False


def train(folder: Path, guard: Guard, **changes: Any) -> Any:
    arming = Arming(guard, 5)
    settings: dict[str, Any] = {"max_steps": 12, "logging_steps": 5, "disable_tqdm": False}
    trainer = make_trainer(
        folder,
        changes.pop("model", None) or scored("dropout"),
        train=samples(24),
        callbacks=[Recorder(), arming],
        **(settings | changes),
    )
    trainer.train()
    assert arming.seen == 12
    return trainer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.0},
        {"lr_scheduler_type": "cosine", "warmup_steps": 3, "weight_decay": 0.1},
        {"bf16": True},
        {"on_nonfinite": "skip"},
        {"optim": "sgd"},
        {"optim": "rmsprop"},
        {"include_num_input_tokens_seen": "all", "logging_nan_inf_filter": False},
        {"dataloader_num_workers": 1},
    ],
    ids=str,
)
def test_nothing_is_read_between_logs(
    changes: dict[str, Any], guard: Guard, tmp_path: Path
) -> None:
    trainer = train(tmp_path, guard, **changes)
    assert len(logged(trainer, "loss")) == 2


def test_the_guard_notices(guard: Guard, tmp_path: Path) -> None:
    class Reading(TrainerCallback):
        def __init__(self, read: Any) -> None:
            self.read = read

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            self.read(trainer._run.metrics["loss"])

    reads = (Tensor.item, float, bool, lambda t: t.tolist(), lambda t: t.cpu(), lambda t: t.numpy())
    for read in reads:
        trainer = make_trainer(tmp_path, callbacks=[Arming(guard, 5), Reading(read)])
        with pytest.raises(Sync):
            trainer.train()
        guard.armed = False
