"""Every schedule, by its name and with its options, gives the rates that the Hugging Face Trainer logs."""

from pathlib import Path
from typing import Any

import pytest

from support.peer import both
from support.shell import logged, scored

transformers = pytest.importorskip("transformers")

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "linear": [{}],
    "cosine": [{}, {"num_cycles": 1.25}],
    "cosine_with_restarts": [{}, {"num_cycles": 3}],
    "polynomial": [{}, {"power": 2.0, "lr_end": 1e-4}],
    "constant": [{}],
    "constant_with_warmup": [{}],
    "inverse_sqrt": [{}, {"timescale": 5}],
    "reduce_lr_on_plateau": [{"patience": 0, "factor": 0.5}],
    "cosine_with_min_lr": [{"min_lr": 0.01}, {"min_lr_rate": 0.2}],
    "cosine_warmup_with_min_lr": [{"min_lr": 0.01}, {"min_lr_rate": 0.2, "warmup_lr_rate": 0.3}],
    "warmup_stable_decay": [
        {"num_decay_steps": 3},
        {"num_decay_steps": 3, "decay_type": "1-sqrt", "min_lr_ratio": 0.1},
    ],
    "greedy": [{"patience": 0, "factor": 0.5, "min_lr": 1e-3}],
}
CASES = [(name, options) for name, several in OPTIONS.items() for options in several]


def test_no_name_is_forgotten() -> None:
    assert set(OPTIONS) == {kind.value for kind in transformers.SchedulerType}


@pytest.mark.row(38, 39, 41)
@pytest.mark.parametrize("warmup", [0, 3, 0.25, 15])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_the_rates_are_the_same(
    name: str, options: dict[str, Any], warmup: float, tmp_path: Path
) -> None:
    follows = name in ("reduce_lr_on_plateau", "greedy")
    changes: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1} if follows else {}
    ours, other = both(
        tmp_path,
        scored("mlp"),
        num_train_epochs=2,
        warmup_steps=warmup,
        lr_scheduler_type=name,
        lr_scheduler_kwargs=options,
        **changes,
    )
    rates = logged(ours.trainer, "learning_rate")
    theirs = logged(other.trainer, "learning_rate")
    assert rates == (pytest.approx(theirs, rel=0, abs=1e-12) if name == "polynomial" else theirs)
    assert len(rates) == 10
    assert len(set(rates)) > 1 or name.startswith("constant")
