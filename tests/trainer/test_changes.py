"""A model that changes between steps is recorded anew, or not at all; never replayed as it was."""

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trainstep as ts
import trainstep.stages
from support.recordings import Pretended, pretend
from support.shell import Normed, Scored, make_trainer, samples, scored
from trainer import TrainerCallback


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    return pretend(monkeypatch)


class Weighted(Scored):
    """Its loss has a weight that others may change, and it counts its passes if told to."""

    weight = 1.0
    counts = False
    passes = 0

    def __init__(self, body: Any) -> None:
        super().__init__(body)
        self.weight, self.passes = 1.0, 0

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        outputs = super().forward(x, labels)
        if self.counts and self.training:
            self.passes += 1
            outputs["loss"] = outputs["loss"] * (1 + self.passes % 3)
        outputs["loss"] = outputs["loss"] * self.weight
        return outputs


class Counting(Weighted):
    counts = True


class Doing(TrainerCallback):
    """Does something to the model at an event."""

    def __init__(self, event: str, do: Callable[[Any, int], Any]) -> None:
        self.do = do
        setattr(self, event, self.react)

    def react(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.do(kwargs["model"], state.global_step)


def train(
    folder: Path, *callbacks: Any, kind: Any = Weighted, steps: int = 12, **options: Any
) -> Any:
    trainer = make_trainer(
        folder,
        scored(Normed, kind=kind),
        train=samples(32),
        callbacks=list(callbacks),
        per_device_train_batch_size=4,
        max_steps=steps,
        **options,
    )
    trainer.train()
    return trainer


def halve(model: Any, step: int) -> None:
    model.weight *= 0.5


def doubled(module: Any, inputs: Any, outputs: Any) -> Any:
    return {**outputs, "loss": outputs["loss"] * 2}


def same(mine: Any, other: Any) -> bool:
    return ts.diff(mine.train_state, other.train_state) == []


def test_what_stays_is_recorded_once(told: Pretended, tmp_path: Path) -> None:
    trainer = train(tmp_path, Doing("on_step_end", lambda model, step: None))
    assert (told.rehearsals, told.recordings, told.replays) == (1, 1, 10)
    assert trainer.lowering == "eager, recorded in CUDA graphs"


def test_nothing_is_looked_for_where_callbacks_leave_the_model_alone(
    told: Pretended, tmp_path: Path
) -> None:
    class Promising(Doing):
        leaves_model_alone = True

    promising = Promising("on_step_end", lambda m, step: setattr(m, "weight", 2.0 + step))
    trainer = train(tmp_path, promising, logging_strategy="no")  # it looks at records, too
    assert "recorded in CUDA graphs" in trainer.lowering


def test_nothing_is_left_of_recordings_when_training_is_over(
    told: Pretended, tmp_path: Path
) -> None:
    gc.disable()  # in a forked process it would free them, and abort
    try:
        trainer = train(tmp_path)
        assert told.recordings == 1
        assert [recording() for recording in told.made] == [None]
    finally:
        gc.enable()
    trainer.train()


def test_what_changes_now_and_then_is_recorded_anew(
    told: Pretended, tmp_path: Path, caplog: Any
) -> None:
    def halve_once(model: Any, step: int) -> None:
        if step == 6:
            halve(model, step)

    with caplog.at_level(logging.INFO):
        trainer = train(tmp_path / "a", Doing("on_step_end", halve_once), log_level="info")
    assert told.recordings == 2
    assert trainer.lowering == "eager, recorded in CUDA graphs"
    (record,) = (r for r in caplog.records if "recorded anew" in r.message)
    assert "weight of the model was changed" in record.message
    assert same(trainer, train(tmp_path / "b", Doing("on_step_end", halve_once), capture="off"))


def test_what_changes_in_every_step_is_not_recorded(
    told: Pretended, tmp_path: Path, caplog: Any
) -> None:
    trainer = train(tmp_path / "a", Doing("on_step_begin", halve))
    assert told.recordings == 0
    assert "weight of the model was changed 3 times within 100 updates" in trainer.lowering
    (record,) = (r for r in caplog.records if "capture is off" in r.message)
    assert record.levelno == logging.WARNING
    assert same(trainer, train(tmp_path / "b", Doing("on_step_begin", halve), capture="off"))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_forward_pass_that_counts_is_not_recorded(
    accumulation: int, told: Pretended, tmp_path: Path
) -> None:
    options = {"kind": Counting, "gradient_accumulation_steps": accumulation}
    trainer = train(tmp_path / "a", **options)
    assert told.recordings == 0
    assert "the forward pass changes passes of the model in every step" in trainer.lowering
    plain = train(tmp_path / "b", capture="off", **options)
    assert trainer.model.passes == plain.model.passes == 12 * accumulation
    assert same(trainer, plain)


class Longest(Weighted):
    """Scales its loss by the most samples it has seen at once; keeps its last loss."""

    most = 0

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        self.most = max(self.most, len(x))
        outputs = super().forward(x, labels)
        outputs["loss"] = outputs["loss"] * self.most
        self.last = outputs["loss"].detach()
        return outputs


def test_what_is_kept_of_a_pass_is_no_change(told: Pretended, tmp_path: Path) -> None:
    trainer = train(tmp_path, Doing("on_step_end", lambda m, step: None), kind=Longest)
    assert trainer.lowering == "eager, recorded in CUDA graphs"
    assert told.recordings == 1


def test_what_evaluations_keep_of_a_pass_is_no_change(told: Pretended, tmp_path: Path) -> None:
    trainer = train(tmp_path, kind=Longest, eval_strategy="steps", eval_steps=2)
    assert trainer.lowering == "eager, recorded in CUDA graphs"
    assert told.recordings == 1


def test_what_another_shape_changes_is_recorded_anew(
    told: Pretended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sizes(self: Any, batches: Any, count: int, device: Any) -> Any:
        batch = next(batches, None)
        if batch is not None and trainer.state.global_step != 6:
            batch = {name: tensor[:2] for name, tensor in batch.items()}
        return [batch] if batch is not None else [], None

    trainer = make_trainer(
        tmp_path,
        scored(Normed, kind=Longest),
        train=samples(64),
        per_device_train_batch_size=4,
        max_steps=12,
        logging_strategy="no",
    )
    monkeypatch.setattr(type(trainer), "get_batch_samples", sizes)
    trainer.train()
    assert trainer.model.most == 4
    # Of two samples: as they were first, and with what four have changed.
    assert told.recordings == 2
    assert trainer.lowering == "eager, recorded in CUDA graphs"


def test_a_failed_attempt_leaves_no_recording(told: Pretended, tmp_path: Path) -> None:
    class Large(Weighted):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            alive.append(sum(made() is not None for made in told.made))
            if len(x) > 4 and len(alive) > 6:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x, labels)

    alive: list[int] = []
    gc.disable()
    try:
        trainer = make_trainer(
            tmp_path,
            scored(Normed, kind=Large),
            train=samples(64),
            per_device_train_batch_size=5,
            max_steps=12,
            auto_find_batch_size=True,
        )
        trainer.train()
    finally:
        gc.enable()
    assert trainer.state.train_batch_size == 4
    assert told.recordings == 2
    assert alive[6:8] == [1, 0]


def test_a_layer_that_is_frozen_in_mid_run_stays_where_it_is(
    told: Pretended, tmp_path: Path
) -> None:
    kept = {}

    def freeze(model: Any, step: int) -> None:
        if step == 6:
            weight = model.body.first.weight.requires_grad_(False)
            kept["weight"] = weight.detach().clone()

    trainer = train(tmp_path / "a", Doing("on_step_end", freeze))
    assert told.recordings == 2
    assert torch.equal(trainer.model.body.first.weight, kept["weight"])
    assert same(trainer, train(tmp_path / "b", Doing("on_step_end", freeze), capture="off"))


@pytest.mark.parametrize("event", ["on_train_begin", "on_epoch_begin", "on_step_end"])
def test_a_hook_that_comes_late_ends_recording(event: str, told: Pretended, tmp_path: Path) -> None:
    calls: list[int] = []

    def hook(model: Any, step: int) -> None:
        if not model._forward_hooks and step in (0, 5):
            model.register_forward_hook(lambda *args: calls.append(1))

    trainer = train(tmp_path, Doing(event, hook))
    assert "the model has hooks" in trainer.lowering
    assert len(calls) == (12 if event != "on_step_end" else 7)


def test_a_callback_for_gradients_that_comes_late_ends_recording(
    told: Pretended, tmp_path: Path
) -> None:
    class Watching(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            pass

    class Adding(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                trainers[0].add_callback(Watching())

    trainers: list[Any] = []
    trainer = make_trainer(tmp_path, scored(Normed), callbacks=[Adding()], max_steps=12)
    trainers.append(trainer)
    trainer.train()
    assert "on_pre_optimizer_step" in trainer.lowering


def test_an_update_that_cannot_be_recorded_is_made_without(
    told: Pretended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.captured import RetreatingStep

    made = []

    def update(self: Any, state: Any, loss: Any, grads: Any) -> Any:
        made.append(state.step)
        if state.step == 4:
            raise ts.CaptureError("CUDA out of memory")
        return original(self, state, loss, grads)

    original = RetreatingStep.update
    monkeypatch.setattr(RetreatingStep, "update", update)
    options = {"gradient_accumulation_steps": 2, "logging_steps": 1}
    trainer = train(tmp_path / "a", **options)
    assert made == [0, 1, 2, 3, 4]
    assert trainer.lowering == "eager, without CUDA graphs: CUDA out of memory"
    plain = train(tmp_path / "b", capture="off", **options)
    assert same(trainer, plain)
    losses = [[r["loss"] for r in t.state.log_history if "loss" in r] for t in (trainer, plain)]
    assert losses[0] == losses[1]


def test_gradients_that_cannot_be_recorded_are_made_without(
    told: Pretended, tmp_path: Path
) -> None:
    told.fail[1] = "it draws on the host"
    trainer = train(tmp_path / "a")
    assert told.recordings == 1
    assert trainer.lowering == "eager, without CUDA graphs: it draws on the host"
    assert same(trainer, train(tmp_path / "b", capture="off"))


class Clipping(TrainerCallback):
    """Changes the norm that gradients are clipped at."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        args.max_grad_norm = 1.0 if state.global_step < 6 else 1e-3


def test_another_norm_to_clip_at_ends_recording(told: Pretended, tmp_path: Path) -> None:
    trainer = train(tmp_path / "a", Clipping())
    assert "args.max_grad_norm was changed to 0.001 during training" in trainer.lowering
    assert told.replays == 5  # the gradients of the step in which it changed are those of a graph
    assert same(trainer, train(tmp_path / "b", Clipping(), capture="off"))


def test_where_transformers_looks_at_masks_compiling_is_advised(
    told: Pretended, tmp_path: Path
) -> None:
    told.fail[1] = "aten._local_scalar_dense waits for the GPU at transformers/masking_utils.py:1"
    assert "torch_compile=True lets steps be recorded" in train(tmp_path).lowering


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")
class TestOnTheGPU:
    """With real graphs, which run no Python: the bits are those of a run without."""

    @pytest.mark.parametrize(
        ("event", "do", "recorded"),
        [
            ("on_step_begin", halve, False),
            ("on_step_end", lambda m, step: halve(m, step) if step == 6 else None, True),
            ("on_step_end", lambda m, step: m.body.norm.requires_grad_(step != 6), True),
            ("on_step_end", lambda m, step: m.body.norm.requires_grad_(step < 6), True),
            ("on_epoch_begin", lambda m, step: m.register_forward_hook(doubled), False),
        ],
        ids=["every step", "once", "there and back", "frozen", "hook"],
    )
    def test_others_change_the_model(
        self, event: str, do: Any, recorded: bool, tmp_path: Path
    ) -> None:
        options = {"use_cpu": False, "gradient_accumulation_steps": 2}
        mine = train(tmp_path / "a", Doing(event, do), **options)
        assert ("recorded in CUDA graphs" in mine.lowering) == recorded
        assert same(mine, train(tmp_path / "b", Doing(event, do), capture="off", **options))

    def test_another_norm_to_clip_at(self, tmp_path: Path) -> None:
        mine = train(tmp_path / "a", Clipping(), use_cpu=False)
        assert "max_grad_norm" in mine.lowering
        assert same(mine, train(tmp_path / "b", Clipping(), use_cpu=False, capture="off"))

    def test_other_options_of_the_optimizer(self, tmp_path: Path) -> None:
        class Decaying(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                for group in kwargs["optimizer"].param_groups:
                    group["weight_decay"] = 0.5 if 5 <= state.global_step < 8 else 0.0

        mine = train(tmp_path / "a", Decaying(), use_cpu=False)
        assert mine.lowering == "eager, recorded in CUDA graphs"
        assert same(mine, train(tmp_path / "b", Decaying(), use_cpu=False, capture="off"))

    def test_the_forward_pass_changes_it(self, tmp_path: Path) -> None:
        options = {"use_cpu": False, "kind": Counting}
        mine = train(tmp_path / "a", **options)
        plain = train(tmp_path / "b", capture="off", **options)
        assert mine.model.passes == plain.model.passes == 12
        assert same(mine, plain)

    @pytest.mark.parametrize("number", [1, 2], ids=["gradients", "update"])
    def test_a_recording_fails(
        self, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = []

        def record(*args: Any, **options: Any) -> Any:
            made.append(1)
            if len(made) == number:
                raise ts.CaptureError("CUDA out of memory")
            return original(*args, **options)

        original = trainstep.stages.record
        options = {"use_cpu": False, "gradient_accumulation_steps": 2, "logging_steps": 1}
        plain = train(tmp_path / "b", capture="off", **options)
        monkeypatch.setattr(trainstep.stages, "record", record)
        mine = train(tmp_path / "a", **options)
        assert len(made) == number
        assert mine.lowering == "eager, without CUDA graphs: CUDA out of memory"
        assert same(mine, plain)
        losses = [[r["loss"] for r in t.state.log_history if "loss" in r] for t in (mine, plain)]
        assert losses[0] == losses[1]
