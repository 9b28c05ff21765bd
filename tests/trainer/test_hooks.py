"""Hooks that scripts override, and accelerate's object that they use inside, take effect."""

from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainstep as ts
from support.shell import At, Recorder, make_args, make_trainer, samples, scored
from trainer import Trainer
from trainer.facade.losses import LossMixin


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def test_a_training_step_that_takes_anything_is_given_the_count(tmp_path: Path) -> None:
    given: list[int] = []

    class Passing(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            given.append(len(args) + len(kwargs))
            return super().training_step(*args, **kwargs)

    make_trainer(tmp_path, make=Passing, max_steps=2).train()
    assert given == [3, 3]


def test_the_batches_of_an_update_can_be_chosen(tmp_path: Path) -> None:
    class Twice(Trainer):
        """Trains on every micro-batch twice."""

        def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
            window, items = super().get_batch_samples(epoch_iterator, num_batches, device)
            return [batch for batch in window for _ in range(2)], items

    trainer = make_trainer(tmp_path, make=Twice, per_device_train_batch_size=5)
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()

    assert trainer.state.global_step == 2
    assert recorder.events.count("substep_end") == 2


def test_the_lengths_of_a_run_can_be_set(tmp_path: Path) -> None:
    class Short(Trainer):
        def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
            *values, _ = super().set_initial_training_values(args, dataloader)
            return (*values, 2)

    trainer = make_trainer(tmp_path, make=Short)
    trainer.train()

    assert trainer.state.global_step == trainer.state.max_steps == 2
    assert make_trainer(tmp_path).set_initial_training_values(
        trainer.args, trainer.get_train_dataloader()
    ) == (1, 5, 10, 10, 2, 5, 5)


def test_the_model_that_trains_can_be_wrapped(tmp_path: Path) -> None:
    class Doubling(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **batch: Any) -> Any:
            outputs = self.inner(**batch)
            return {**outputs, "loss": 2 * outputs["loss"]}

    class Wrapping(Trainer):
        def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
            return Doubling(model)

    plain, doubled = (
        make_trainer(tmp_path, scored("mlp"), make=make, max_grad_norm=0, max_steps=1)
        for make in (Trainer, Wrapping)
    )
    plain.train()
    doubled.train()

    assert isinstance(doubled.model_wrapped, Doubling)
    assert doubled.model is not doubled.model_wrapped
    first, second = plain.state.log_history[0], doubled.state.log_history[0]
    assert second["loss"] == 2 * first["loss"]
    assert second["grad_norm"] == 2 * first["grad_norm"]


def test_inputs_go_through_the_hook_that_moves_them(tmp_path: Path) -> None:
    class Halving(Trainer):
        def _prepare_input(self, data: Any) -> Any:
            return {**super()._prepare_input(data), "x": data["x"] / 2}

    trainer = make_trainer(tmp_path, make=Halving)
    batch = {"x": torch.ones(2, 4), "labels": torch.ones(2, 2)}

    assert torch.equal(trainer._prepare_inputs(batch)["x"], torch.full((2, 4), 0.5))


def test_autocasting_can_be_switched_off(tmp_path: Path) -> None:
    class Full(Trainer):
        def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
            return nullcontext()

    half, full, plain = (
        make_trainer(tmp_path, scored("mlp"), make=make, bf16=bf16, max_steps=2)
        for make, bf16 in ((Trainer, True), (Full, True), (Trainer, False))
    )
    for trainer in (half, full, plain):
        trainer.train()

    assert ts.equal(weights(full), weights(plain))
    assert not ts.equal(weights(half), weights(plain))


@pytest.mark.row(98)
def test_a_log_written_for_older_versions_sees_every_record(tmp_path: Path) -> None:
    class Old(Trainer):
        def log(self, logs: dict[str, float]) -> None:  # type: ignore[override]
            super().log({**logs, "seen": 1})

    trainer = make_trainer(tmp_path, make=Old, eval_strategy="epoch")
    trainer.train()

    assert len(trainer.state.log_history) == 7
    assert all(record["seen"] == 1 for record in trainer.state.log_history)


@pytest.mark.parametrize("count", [0, 1])
def test_model_init_takes_nothing_or_the_trial(count: int, tmp_path: Path) -> None:
    given: list[Any] = []

    def with_trial(trial: Any) -> nn.Module:
        given.append(trial)
        return scored()

    make: Any = with_trial if count else scored_without_arguments
    trainer = Trainer(args=make_trainer(tmp_path).args, model_init=make)

    assert isinstance(trainer.call_model_init("a trial"), nn.Module)
    assert given == ([None, "a trial"] if count else [])


def scored_without_arguments() -> nn.Module:
    return scored()


def test_model_init_that_takes_more_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no argument or the trial; it takes 2"):
        Trainer(args=make_trainer(tmp_path).args, model_init=lambda a, b: scored())


@pytest.mark.row(59)
def test_the_accelerator_has_the_settings(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        gradient_accumulation_steps=3,
        accelerator_config={"even_batches": False, "split_batches": True},
    )
    options = trainer._build_accelerator_args()

    assert len(options["kwargs_handlers"]) == 1
    assert trainer.accelerator is trainer.accelerator
    assert trainer.accelerator.gradient_accumulation_steps == 1
    assert trainer.accelerator.gradient_state.plugin_kwargs["num_steps"] == 1
    assert not trainer.accelerator.even_batches
    assert trainer.accelerator.split_batches
    assert trainer.accelerator.use_seedable_sampler
    assert trainer.accelerator.unwrap_model(trainer.model) is trainer.model


def test_an_accelerator_of_ones_own_can_be_made(tmp_path: Path) -> None:
    class Own(Trainer):
        def create_accelerator_and_postprocess(self) -> None:
            self.accelerator = "mine"

    assert make_trainer(tmp_path, make=Own).accelerator == "mine"


@pytest.mark.parametrize("half", [{}, {"fp16": True}])
def test_a_training_step_written_for_accelerate_has_the_same_bits(
    half: dict[str, Any], tmp_path: Path
) -> None:
    class Imperative(Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            model.train()
            inputs = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            loss = loss / self.current_gradient_accumulation_steps
            self.accelerator.backward(loss)
            return loss.detach()

    trained = []
    for make in (Trainer, Imperative):
        trainer = make_trainer(tmp_path, make=make, gradient_accumulation_steps=2, **half)
        trainer.train()
        trained.append(trainer)

    assert ts.equal(weights(trained[0]), weights(trained[1]))


@pytest.mark.row(44)
def test_half_precision_training_scales_the_loss_as_torch_does(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        scored("mlp"),
        fp16=True,
        optim="adamw_torch_fused",
        lr_scheduler_type="constant",
        max_grad_norm=0,
    )
    initial = weights(trainer)
    batches = list(trainer.get_train_dataloader())
    trainer.train()

    model = scored("mlp")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for batch in batches:
        with torch.autocast("cpu", torch.float16):
            loss = model(**batch)["loss"]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    assert ts.equal(weights(trainer), {n: p.detach() for n, p in model.named_parameters()})
    assert float(trainer.train_state.extras["loss_scale"]["scale"]) == scaler.get_scale()


class Overflowing(nn.Module):
    """A linear model whose gradient is infinite in the forward passes that ``at`` lists."""

    def __init__(self, *at: int) -> None:
        super().__init__()
        self.body = scored("mlp")
        self.at, self.calls = at, 0

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        loss = self.body(x, labels)["loss"]
        self.calls += 1
        return {"loss": loss * float("inf") if self.calls in self.at else loss}


@pytest.mark.row(44)
@pytest.mark.parametrize("optim", ["adamw_torch", "adagrad"])
@pytest.mark.parametrize("half", [{"fp16": True}, {"on_nonfinite": "skip"}])
def test_updates_that_overflow_are_left_out(
    half: dict[str, Any], optim: str, tmp_path: Path
) -> None:
    trainer = make_trainer(
        tmp_path, Overflowing(1, 3), optim=optim, logging_nan_inf_filter=False, **half
    )
    steps: list[dict[str, Tensor]] = [weights(trainer)]
    for step in range(1, 6):
        trainer.add_callback(At("step_end", step, lambda control: steps.append(weights(trainer))))
    trainer.train()

    same = [ts.equal(a, b) for a, b in pairwise(steps)]
    assert same == [True, False, True, False, False]
    assert int(trainer.train_state.extras["skipped"]) == 2
    if "fp16" in half:
        assert float(trainer.train_state.extras["loss_scale"]["scale"]) == 2.0**14
    assert trainer.state.global_step == 5


def test_stopping_at_what_is_not_finite_contradicts_loss_scaling(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'on_nonfinite="raise" would stop at the first overflow'):
        make_trainer(tmp_path, fp16=True, on_nonfinite="raise")


def test_weights_in_half_precision_cannot_be_trained_with_a_loss_scale(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, scored("mlp").half(), fp16=True)
    with pytest.raises(ValueError, match=r"fp16=True keeps float32 weights.*are float16"):
        trainer.train()


@pytest.mark.row(9)
def test_a_library_model_without_a_head_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    bare = transformers.BertModel(config)
    with pytest.raises(ValueError, match="BertModel computes hidden states and no loss"):
        make_trainer(tmp_path, bare)
    with pytest.raises(ValueError, match="BertModel computes hidden states and no loss"):
        Trainer(bare, make_trainer(tmp_path).args).train()
    make_trainer(tmp_path, transformers.BertForSequenceClassification(config))

    class Own(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return LossMixin.compute_loss(self, *args, **kwargs)

    make_trainer(tmp_path, bare, make=Own)
    make_trainer(tmp_path, bare, more={"compute_loss_func": lambda *a, **k: None})


@pytest.mark.row(144)
def test_models_that_have_a_place_are_not_moved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = scored("mlp")
    model.hf_device_map = {"body": 0, "head": 1}  # type: ignore[assignment]
    model.to = None  # type: ignore[assignment]  # moving it would fail
    args = make_args(tmp_path)
    args._n_gpu = 2
    trainer = Trainer(model, args)

    assert trainer.is_model_parallel
    assert not trainer.place_model_on_device
    assert (args.n_gpu, args.train_batch_size) == (1, args.per_device_train_batch_size)
    assert "GPUs" not in caplog.text
    plain = make_trainer(tmp_path)
    assert plain.place_model_on_device
    assert not plain.is_model_parallel
    assert (plain.get_tp_size(), plain.get_cp_size(), plain.get_sp_size()) == (1, 1, 1)


@pytest.mark.row(144)
def test_layers_with_hooks_that_move_their_inputs_train_as_others(tmp_path: Path) -> None:
    from accelerate import dispatch_model

    digests = []
    for spread in (False, True):
        model: Any = scored("mlp")
        if spread:
            places = {name: "cpu" for name, _ in model.body.named_children()}
            model.body = dispatch_model(model.body, places, main_device="cpu", force_hooks=True)
            model.hf_device_map = {f"body.{name}": place for name, place in places.items()}
            assert model.body[0]._hf_hook is not None
        trainer = make_trainer(tmp_path, model)
        trainer.train()
        digests.append(ts.digest(trainer.train_state))
    assert digests[0] == digests[1]


@pytest.mark.row(138)
def test_one_process_uses_one_of_several_gpus(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = make_args(tmp_path, per_device_train_batch_size=3)
    args._n_gpu = 4
    trainer = Trainer(scored("mlp"), args, train_dataset=samples(6))
    assert "There are 4 GPUs, and this process trains on one of them, cpu" in caplog.text
    assert "torchrun --nproc_per_node=4" in caplog.text
    assert (args.n_gpu, trainer._train_batch_size) == (1, 3)
    assert trainer.get_total_train_batch_size(args) == 3 * args.gradient_accumulation_steps
    trainer.train()
    assert trainer.state.global_step == 2 * args.num_train_epochs
