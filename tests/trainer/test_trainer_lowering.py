"""Steps compiled, or from CUDA graphs, have the bits of steps as they are; what prevents that is said."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trainstep as ts
from support.shell import At, Normed, Scored, make_trainer, samples, scored
from trainer import Trainer, TrainerCallback
from trainer.captured import CapturedEngine

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.row(21)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_compiled_model_has_the_same_bits(accumulation: int, tmp_path: Path) -> None:
    # This backend runs what was traced as it is: only tracing could change anything.
    torch._dynamo.reset()
    options = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 2}
    plain = make_trainer(tmp_path, **options)
    compiled = make_trainer(tmp_path, torch_compile_backend="eager", **options)
    plain.train()
    compiled.train()

    assert hasattr(compiled.model_wrapped, "_orig_mod")
    assert not hasattr(compiled.model, "_orig_mod")
    assert ts.digest(compiled.train_state) == ts.digest(plain.train_state)
    wrapped = compiled.model_wrapped
    compiled.train()
    assert compiled.model_wrapped is wrapped


def test_why_there_are_no_graphs_is_said_once(tmp_path: Path, caplog: Any) -> None:
    class Own(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    class Clipped(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            pass

    options: dict[str, Any] = {"capture": "off", "log_level": "info"}
    trainer = make_trainer(tmp_path, make=Own, callbacks=[Clipped()], **options)
    trainer._prepare_inputs = lambda inputs: inputs
    with caplog.at_level(logging.INFO, logger="trainer"):
        trainer.train()

    (message,) = (r.message for r in caplog.records if "CUDA graphs" in r.message)
    assert message == (
        'Steps are eager, without CUDA graphs: capture="off"; the device is cpu; Own overrides '
        "compute_loss; Own overrides _prepare_inputs; a callback wants the clipped gradients "
        "(on_pre_optimizer_step)."
    )


class Shapes(TrainerCallback):
    """Notes how the trainer runs its steps at the end, and gradients as they were applied."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.trainer: Any = None
        self.graphs = 0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        grads = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        self.norms.append(float(torch.stack([g.double().norm() for g in grads]).norm()))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        engine = self.trainer._run.engine
        if isinstance(engine, CapturedEngine) and engine._graphs is not None:
            stages = engine._graphs._stages.values()
            self.graphs = sum(stage.recording is not None for stage in stages)


class Normal(nn.Module):
    """Batch norm and dropout, so that both buffers and generators matter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


@pytest.mark.filterwarnings("ignore")
class TestOnTheGPU:
    pytestmark = gpu

    def train(self, folder: Path, name: Any = Normal, **options: Any) -> tuple[Any, Shapes]:
        watching = Shapes()
        changes = {
            "use_cpu": False,
            "num_train_epochs": 4,
            "per_device_train_batch_size": 4,
            "warmup_steps": 3,
            **options,
        }
        trainer = make_trainer(
            folder,
            scored(name),
            train=samples(26),
            callbacks=[watching],
            **changes,
        )
        watching.trainer = trainer
        trainer.train()
        return trainer, watching

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"gradient_accumulation_steps": 3},
            {"bf16": True},
            {"fp16": True},
            {"on_nonfinite": "skip"},
            {"max_grad_norm": 0},
            {"optim": "sgd"},
            {"optim": "adagrad"},
            {"weight_decay": 0.1, "lr_scheduler_type": "cosine"},
            {"async_save": True, "save_strategy": "steps", "save_steps": 4},
            {"eval_strategy": "steps", "eval_steps": 3},
            {"dataloader_num_workers": 2},
        ],
        ids=lambda options: "-".join(options) or "default",
    )
    def test_graphs_have_the_same_bits(self, options: dict[str, Any], tmp_path: Path) -> None:
        plain, theirs = self.train(tmp_path / "a", capture="off", **options)
        captured, mine = self.train(tmp_path / "b", **options)

        assert theirs.graphs == 0
        assert mine.graphs >= 1
        assert ts.diff(captured.train_state, plain.train_state) == []
        assert list(map(repr, mine.norms)) == list(map(repr, theirs.norms))  # nan == nan
        for a, b in zip(captured.state.log_history, plain.state.log_history, strict=True):
            timeless = [k for k in a if "runtime" not in k and "second" not in k]
            assert {k: repr(a[k]) for k in timeless} == {k: repr(b[k]) for k in timeless}

    def test_records_that_nobody_waits_for_are_the_same(self, tmp_path: Path) -> None:
        histories = []
        for name, capture in (("a", "auto"), ("b", "off")):
            options: dict[str, Any] = {"num_train_epochs": 4, "logging_steps": 3, "bf16": True}
            trainer = make_trainer(
                tmp_path / name, scored(Normal), use_cpu=False, capture=capture, **options
            )
            trainer.train()
            histories.append([r for r in trainer.state.log_history if "loss" in r])
        assert histories[0] == histories[1]

    def test_a_resumed_run_has_the_same_bits(self, tmp_path: Path) -> None:
        options = {"save_strategy": "steps", "save_steps": 10, "gradient_accumulation_steps": 2}
        whole, _ = self.train(tmp_path, num_train_epochs=6, **options)
        trainer = make_trainer(
            tmp_path,
            scored(Normal),
            train=samples(26),
            use_cpu=False,
            num_train_epochs=6,
            per_device_train_batch_size=4,
            warmup_steps=3,
            **options,
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
        assert ts.diff(trainer.train_state, whole.train_state) == []

    def test_a_model_that_waits_for_the_device_trains_without_graphs(
        self, tmp_path: Path, caplog: Any
    ) -> None:
        class Waiting(Scored):
            def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
                outputs = super().forward(x, labels)
                return outputs if outputs["logits"].sum().item() < 1e9 else {}

        def run(folder: Path, **options: Any) -> Any:
            trainer = make_trainer(
                folder, scored(Normal, kind=Waiting), use_cpu=False, num_train_epochs=3, **options
            )
            trainer.train()
            return trainer

        captured, plain = run(tmp_path / "a"), run(tmp_path / "b", capture="off")
        assert ts.diff(captured.train_state, plain.train_state) == []
        (record,) = (r for r in caplog.records if "capture is off" in r.message)
        assert "aten._local_scalar_dense" in record.message
        assert "test_trainer_lowering.py" in record.message

    def test_layers_that_run_again_with_dropout_are_not_recorded(self, tmp_path: Path) -> None:
        class Again(Scored):
            def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
                logits = checkpoint(self.body, x, use_reentrant=False)
                return {"loss": nn.functional.mse_loss(logits, labels), "logits": logits}

        runs = [
            make_trainer(
                tmp_path / capture,
                scored("dropout", kind=Again),
                use_cpu=False,
                num_train_epochs=3,
                capture=capture,
            )
            for capture in ("auto", "off")
        ]
        for trainer in runs:
            trainer.train()
        assert "gradient checkpointing" in str(runs[0].lowering)
        assert ts.diff(runs[0].train_state, runs[1].train_state) == []

    def test_noisy_embeddings_and_stops_in_the_middle(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"use_cpu": False, "num_train_epochs": 3}
        runs = []
        for name, capture in (("a", "auto"), ("b", "off")):
            stop = At("step_end", 7, lambda control: setattr(control, "should_training_stop", True))
            trainer = make_trainer(
                tmp_path / name, scored(Normed), callbacks=[stop], capture=capture, **options
            )
            trainer.train()
            runs.append(trainer)
        assert ts.diff(runs[0].train_state, runs[1].train_state) == []

    def test_compiled_and_captured(self, tmp_path: Path) -> None:
        torch._dynamo.reset()
        # A shorter last batch would be compiled for any length, and then be used for all.
        options = {"torch_compile": True, "dataloader_drop_last": True}
        plain, _ = self.train(tmp_path / "a", capture="off", **options)
        captured, mine = self.train(tmp_path / "b", **options)
        assert mine.graphs >= 1
        assert ts.diff(captured.train_state, plain.train_state) == []
