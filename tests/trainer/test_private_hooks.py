"""Private methods of the Hugging Face Trainer that subclasses override: each is called, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import trainstep as ts
from support.shell import At, Killed, Scored, kill, logged, make_trainer, samples, scored, weights
from trainer import Trainer, TrainerCallback
from trainer.support import _UNUSED_HOOKS, SEARCHING, UPLOADING

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
BEST: dict[str, Any] = SAVING | {"eval_strategy": "steps", "eval_steps": 2}
BEST |= {"load_best_model_at_end": True}


def counting(*names: str) -> Any:
    """Return a subclass whose overrides note their calls and do what the base class does."""
    calls: list[str] = []

    def override(name: str) -> Any:
        def method(self: Any, *given: Any, **options: Any) -> Any:
            calls.append(name)
            return getattr(Trainer, name)(self, *given, **options)

        return method

    return type("Own", (Trainer,), {name: override(name) for name in names} | {"calls": calls})


def test_every_private_method_of_upstream_is_called_or_refused() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = {
        name
        for name, value in vars(transformers.Trainer).items()
        if name.startswith("_") and not name.startswith("__") and callable(value)
    }
    known = {*_UNUSED_HOOKS, *UPLOADING, *SEARCHING}
    assert {name for name in theirs - known if not hasattr(Trainer, name)} == set()
    assert {name for name in known if hasattr(Trainer, name)} == set()


@pytest.mark.parametrize("name", _UNUSED_HOOKS)
def test_what_is_never_called_is_refused(name: str, tmp_path: Path) -> None:
    own = type("Own", (Trainer,), {name: lambda self: None})
    with pytest.raises(NotImplementedError, match=f"Own overrides {name}, which this version"):
        make_trainer(tmp_path, make=own)


def test_methods_of_uploads_and_searches_may_be_defined(tmp_path: Path) -> None:
    own = type("Own", (Trainer,), {name: lambda self: None for name in (*UPLOADING, *SEARCHING)})
    assert make_trainer(tmp_path, make=own).train().global_step == 5


def test_hooks_of_a_run_are_called(tmp_path: Path) -> None:
    once = ("_load_best_model", "_move_model_to_device", "_get_train_sampler", "_wrap_model")
    several = ("_save", "_save_checkpoint", "_get_output_dir", "_evaluate", "_prepare_inputs")
    several += ("_set_signature_columns_if_needed", "_remove_unused_columns")
    several += ("_get_collator_with_removed_columns", "_determine_best_metric")
    own = counting(*once, *several)
    make_trainer(tmp_path, make=own, **BEST, max_steps=4).train()
    assert {name: own.calls.count(name) for name in once[:3]} == dict.fromkeys(once[:3], 1)
    assert {name for name in (*once, *several) if name not in own.calls} == set()
    assert own.calls.count("_save") == own.calls.count("_save_checkpoint") == 2


def test_save_writes_what_an_override_makes_of_it(tmp_path: Path) -> None:
    class Renaming(Trainer):
        def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
            state = {f"inner.{k}": v for k, v in self.model.state_dict().items()}
            super()._save(output_dir, state_dict=state)

    trainer = make_trainer(tmp_path, make=Renaming, **SAVING, max_steps=2)
    trainer.train()
    from safetensors.torch import load_file

    for folder in (tmp_path / "checkpoint-2", tmp_path / "mine"):
        if folder.name == "mine":
            trainer.save_model(str(folder))
        names = load_file(folder / "model.safetensors")
        assert names
        assert all(name.startswith("inner.body.") for name in names)
    again = make_trainer(tmp_path, make=Renaming, **SAVING, max_steps=2)
    again.train(resume_from_checkpoint=True)  # the checkpoint has the weights all the same
    assert ts.digest(again.train_state) == ts.digest(trainer.train_state)


def test_a_checkpoint_can_be_added_to(tmp_path: Path) -> None:
    class Adding(Trainer):
        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            super()._save_checkpoint(model, trial)
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            (folder / "note.txt").write_text("mine")

    make_trainer(tmp_path, make=Adding, **SAVING, max_steps=2).train()
    assert (tmp_path / "checkpoint-2" / "note.txt").read_text() == "mine"
    again = make_trainer(tmp_path, make=Adding, **SAVING, max_steps=4)
    assert again.train(resume_from_checkpoint=True).global_step == 4


def test_another_folder_for_checkpoints(tmp_path: Path) -> None:
    class Elsewhere(Trainer):
        def _get_output_dir(self, trial: Any = None) -> str:
            return str(tmp_path / "elsewhere")

    make_trainer(tmp_path, make=Elsewhere, **SAVING, max_steps=2).train()
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["checkpoint-2"]
    again = make_trainer(tmp_path, make=Elsewhere, **SAVING, max_steps=3)
    assert again.train(resume_from_checkpoint=True).global_step == 3


class AsUpstream(Trainer):
    """Overrides with the parameters that the Hugging Face Trainer's methods have, all required."""

    asked: list[Any]

    def _get_output_dir(self, trial: Any) -> str:
        self.asked.append(trial)
        return str(Path(str(self.args.output_dir)) / "trial")

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        self.asked.append(trial)
        return super()._determine_best_metric(metrics, trial)


def test_hooks_get_the_trial_that_upstream_gives_them(tmp_path: Path) -> None:
    AsUpstream.asked = []
    trainer = make_trainer(tmp_path, make=AsUpstream, **BEST, save_total_limit=1, max_steps=2)
    trainer.train()
    assert set(AsUpstream.asked) == {None}
    assert [path.name for path in (tmp_path / "trial").iterdir()] == ["checkpoint-2"]
    assert trainer.state.best_metric is not None
    again = make_trainer(tmp_path, make=AsUpstream, max_steps=3)
    assert again.train(resume_from_checkpoint=True).global_step == 3


def test_weights_that_an_override_loads_are_taken(tmp_path: Path) -> None:
    make_trainer(tmp_path, scored("mlp"), **SAVING, max_steps=2).train()

    class Zeros(Trainer):
        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            self.folder = Path(resume_from_checkpoint).name
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.zero_()

    for theirs in (False, True):
        if theirs:  # what is left is what the Hugging Face Trainer would have written
            make_trainer(
                tmp_path, scored("mlp"), **SAVING, max_steps=2, checkpoint_format="hf"
            ).train()
            for name in ("manifest", "train_state", "training_args", "host_rng-0"):
                (tmp_path / "checkpoint-2" / f"{name}.json").unlink()
        trainer = make_trainer(tmp_path, scored("mlp"), make=Zeros, max_steps=2)
        assert trainer.train(resume_from_checkpoint=True).global_step == 2
        assert trainer.folder == "checkpoint-2"
        assert not any(tensor.any() for tensor in weights(trainer).values())


def test_the_signature_can_be_given(tmp_path: Path) -> None:
    class Judged(Trainer):
        def _set_signature_columns_if_needed(self) -> None:
            if self._signature_columns is None:
                self._signature_columns = ["x", "labels", "weight"]

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
            factor = inputs.pop("weight").mean()
            outputs = model(**inputs)
            return (
                (factor * outputs["loss"], outputs) if return_outputs else factor * outputs["loss"]
            )

    rows = [row | {"weight": torch.tensor(2.0), "id": i} for i, row in enumerate(samples())]
    plain = make_trainer(tmp_path, scored("mlp"), max_steps=1)
    own = make_trainer(tmp_path, scored("mlp"), make=Judged, train=rows, max_steps=1)
    plain.train()
    own.train()
    assert logged(own, "loss") == [2 * logged(plain, "loss")[0]]


def test_callbacks_take_up_their_state_through_the_hook(tmp_path: Path) -> None:
    own = counting("_load_callback_state")
    settings: dict[str, Any] = {"restore_callback_states_from_checkpoint": True, "max_steps": 2}
    make_trainer(tmp_path, make=own, **SAVING, **settings).train()
    make_trainer(tmp_path, make=own, **settings).train(resume_from_checkpoint=True)
    assert own.calls == ["_load_callback_state"]


def test_attributes_of_engines(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    assert not trainer.is_fsdp_enabled
    assert not trainer.is_deepspeed_enabled
    assert trainer.hub_model_id is None
    values = torch.arange(3)
    assert torch.equal(trainer.gather_function(values), values)
    assert trainer.accelerator.unwrap_model(trainer.model) is trainer.model


class Prepared(Trainer):
    """Returns a loader that accelerate has prepared, as overridden methods of older scripts do."""

    def get_train_dataloader(self) -> Any:
        loader = DataLoader(
            self.train_dataset, self._train_batch_size, collate_fn=self.data_collator
        )
        return self.accelerator.prepare(loader)


def test_checkpoints_with_a_loader_that_accelerate_prepared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = make_trainer(tmp_path / "whole", make=Prepared, **SAVING, max_steps=7)
    whole.train()
    cut = make_trainer(
        tmp_path / "cut", make=Prepared, **SAVING, max_steps=7, callbacks=[At("step_end", 3, kill)]
    )
    with pytest.raises(Killed):
        cut.train()
    again = make_trainer(tmp_path / "cut", make=Prepared, **SAVING, max_steps=7)
    again.train(resume_from_checkpoint=True)
    assert ts.digest(again.train_state) == ts.digest(whole.train_state)
    assert "2 batches are read again" in caplog.text


class ByMode(Trainer):
    """Logs its own metrics for the mode that the model is in, as trl's trainers do."""

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        logs["mode"] = "train" if self.model.training else "eval"
        super().log(logs, start_time)


class Modes(TrainerCallback):
    """Notes the mode of the model at evaluations and predictions."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.seen.append(model.training)

    on_predict = on_evaluate


def test_the_model_is_in_evaluation_mode_while_an_evaluation_is_logged(tmp_path: Path) -> None:
    modes = Modes()
    trainer = make_trainer(
        tmp_path, make=ByMode, callbacks=[modes], eval_strategy="steps", eval_steps=2, max_steps=2
    )
    trainer.train()
    evaluated = [r["mode"] for r in trainer.state.log_history if "eval_loss" in r]
    assert evaluated == ["eval"]
    assert [r["mode"] for r in trainer.state.log_history if "loss" in r] == ["train", "train"]
    trainer.predict(samples(2))
    assert modes.seen == [False, False]
    assert trainer.model.training  # as before


class Bare(nn.Module):
    """Takes no labels: its loss is the trainer's business."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_labels_that_the_model_does_not_take_do_not_disturb_prediction(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, Bare())
    predicted = trainer.predict(samples(3))
    assert predicted.predictions.shape == (3, 2)


def test_an_unknown_field_of_a_subclass_of_transformers_arguments_is_kept(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from dataclasses import dataclass

    @dataclass
    class Mine(transformers.TrainingArguments):  # type: ignore[name-defined]
        beta: float = 0.5

    trainer = Trainer(Scored(Bare()), Mine(output_dir=str(tmp_path), use_cpu=True, beta=0.25))
    assert trainer.args.beta == 0.25


def test_dicts_of_a_subclass_may_be_json_text(tmp_path: Path) -> None:
    from dataclasses import dataclass, field

    from trainer import HfArgumentParser, TrainingArguments

    @dataclass
    class Mine(TrainingArguments):
        _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "extra"]  # noqa: RUF012
        extra: dict | str | None = field(default=None)

    words = ["--output_dir", str(tmp_path), "--extra", '{"a": 1, "b": "true"}']
    (args,) = HfArgumentParser(Mine).parse_args_into_dataclasses(words)
    assert args.extra == {"a": 1, "b": True}
