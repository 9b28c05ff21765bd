"""Arguments that this version cannot honour."""

from pathlib import Path
from typing import Any

import pytest

from support.shell import make_args, make_trainer, samples, scored
from trainer import Trainer, TrainingArguments
from trainer.support import refuse_unsupported


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
