"""Choices are checked at construction; clipping can be switched off."""

from pathlib import Path
from typing import Any

import pytest

from support.shell import make_args, make_trainer
from trainer.optimization import make_transforms


@pytest.mark.parametrize(("norm", "count"), [(1.0, 1), (0.0, 0), (None, 0), (-1.0, 0)])
def test_clipping_can_be_switched_off(norm: Any, count: int, tmp_path: Path) -> None:
    assert len(make_transforms(make_args(tmp_path, max_grad_norm=norm))) == count


def test_unknown_names_are_refused_with_the_valid_ones(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"optim: 'adamw' is not a valid .*; choose one of 'adamw_torch'"
    ):
        make_args(tmp_path, optim="adamw")
    with pytest.raises(ValueError, match=r"lr_scheduler_type: 'sine' is not a valid .*'cosine'"):
        make_args(tmp_path, lr_scheduler_type="sine")


@pytest.mark.row(39)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"optim": "adamw_apex_fused"},
            ImportError,
            "optim='adamw_apex_fused' needs the package apex",
        ),
        ({"optim": "sgd", "optim_args": "a"}, ValueError, "expected key=value, got 'a'"),
        ({"optim": "sgd", "optim_args": "nesterov=ja"}, ValueError, "expected True or False"),
        ({"optim_args": "beta=0.9"}, ValueError, "adamw_torch_fused does not take beta"),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 1}},
            TypeError,
            "cosine does not take 'cycles'; it takes num_training_steps, num_warmup_steps, num_cycles",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            ValueError,
            "give exactly one of min_lr",
        ),
    ],
)
def test_bad_choices_are_refused_before_any_work(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, **changes)
