"""Arguments that this version cannot honour."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.shell import make_args, make_trainer, samples, scored
from trainer import Trainer, TrainingArguments
from trainer.distributed.deepspeed_plan import Zero
from trainer.support import refuse_bypassed_hooks, refuse_unsupported, refuse_unused_hooks


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("debug", ["tpu_metrics_debug"]),
        ("push_to_hub", True),
        ("report_to", ["tensorboard"]),
    ],
)
def test_an_argument_without_effect_is_refused_when_the_trainer_is_built(
    name: str, value: Any, tmp_path: Path
) -> None:
    args = make_args(tmp_path)
    setattr(args, name, value)
    with pytest.raises(NotImplementedError, match=f"not available in this version: {name}="):
        refuse_unsupported(args)
    with pytest.raises(NotImplementedError, match="Leave these at their defaults"):
        make_trainer(tmp_path, **{name: value})


def test_all_of_them_are_listed_at_once(tmp_path: Path) -> None:
    args = make_args(tmp_path)
    args.push_to_hub, args.async_save, args.report_to = True, True, ["wandb"]
    with pytest.raises(NotImplementedError, match=r"push_to_hub=True, report_to=\['wandb'\]\."):
        refuse_unsupported(args)


def test_the_defaults_are_supported(tmp_path: Path) -> None:
    refuse_unsupported(make_args(tmp_path))


def test_hooks_that_nothing_calls_are_refused(tmp_path: Path) -> None:
    class Looping(Trainer):
        def _inner_training_loop(self) -> None:
            return None

    with pytest.raises(NotImplementedError, match="Looping overrides _inner_training_loop, which"):
        make_trainer(tmp_path, make=Looping)


PARTS = {"fsdp": ["full_shard"], "fsdp_config": None}
WHOLE = PARTS | {"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}


def own(name: str, zero: dict[str, Any] | None = None, **changes: Any) -> Trainer:
    """A trainer, not constructed, on one of two processes, that overrides a method."""
    trainer = object.__new__(type("Own", (Trainer,), {name: lambda self: None}))
    args = {"world_size": 2, "save_strategy": "steps", "enable_jit_checkpoint": False}
    trainer.args = SimpleNamespace(**(args | {"fsdp": None, "fsdp_config": None} | changes))  # type: ignore[assignment]
    trainer._zero = None if zero is None else Zero({"zero_optimization": zero})
    return trainer


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (own("_load_from_checkpoint", **WHOLE), "_load_from_checkpoint, which fsdp does not call"),
        (own("_load_from_checkpoint", {"stage": 1}), "which deepspeed does not call"),
        (
            own("save_model", **WHOLE),
            "save_model, which checkpoints are not .* fsdp: override _save",
        ),
        (own("save_model", {"stage": 1}), "save_model, which checkpoints are not .* deepspeed"),
        (own("_save", **PARTS), "_save, .*: set state_dict_type to FULL_STATE_DICT in fsdp_config"),
        (own("_save", {"stage": 3}), "_save, .*: set stage3_gather_16bit_weights_on_model_save"),
    ],
)
def test_overrides_that_checkpoints_in_parts_pass_over_are_refused(
    trainer: Any, message: str
) -> None:
    with pytest.raises(NotImplementedError, match=f"^Own overrides {message}|{message}"):
        refuse_unused_hooks(trainer)


def test_overrides_that_have_an_effect_are_not() -> None:
    gathered = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    trainers = [own("_save", **WHOLE), own("_save", gathered), own("_save", {"stage": 2})]
    trainers += [own(name) for name in ("_save", "save_model", "_load_from_checkpoint")]
    unsaved: Any = {"save_strategy": "no"}
    trainers += [own("save_model", {"stage": 1}, **unsaved), own("_save", **PARTS, **unsaved)]
    for trainer in trainers:
        refuse_unused_hooks(trainer)
    for trainer in trainers[-2:]:  # a callback has asked for a checkpoint
        with pytest.raises(NotImplementedError, match="Own overrides"):
            refuse_bypassed_hooks(trainer, saves=True)


def test_arguments_of_transformers_are_taken_over(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=0.125,
        eval_strategy="epoch",
        use_cpu=True,
        hub_token="secret",
    )
    trainer = Trainer(scored(), theirs, eval_dataset=samples())

    assert type(trainer.args) is TrainingArguments
    assert trainer.args.learning_rate == 0.125
    assert trainer.args.eval_strategy == "epoch"
    assert trainer.args.hub_token == "secret"


def test_other_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match=r"args must be a trainer.TrainingArguments, got dict"):
        Trainer(scored(), {"output_dir": "x"})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["push_to_hub", "create_model_card", "hyperparameter_search"])
def test_methods_that_are_missing_say_why(name: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with pytest.raises(AttributeError, match=rf"Trainer\.{name}: .* is not available"):
        getattr(trainer, name)()
    assert not hasattr(trainer, name)


def test_other_names_that_are_missing_are_told_as_ever(tmp_path: Path) -> None:
    class Broken(Trainer):
        @property
        def shown(self) -> Any:
            return self.hidden

    trainer = make_trainer(tmp_path, make=Broken)
    for name in ("shown", "hidden"):
        with pytest.raises(AttributeError, match="'Broken' object has no attribute 'hidden'"):
            getattr(trainer, name)
