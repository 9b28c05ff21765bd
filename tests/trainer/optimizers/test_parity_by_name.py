"""The same weights as the Hugging Face Trainer, with every optimizer that is installed."""

from pathlib import Path

import pytest
from torch import Tensor

from support.peer import assert_same_weights, both
from support.shell import logged, make_args, scored
from trainer.optimizers import check_optimizer

TARGETS = {"optim_target_modules": "all-linear", "optim_args": "rank=2,update_proj_gap=2"}
NAMES = [
    *("adafactor", "stable_adamw", "grokadamw", "lomo", "adalomo"),
    *("schedule_free_adamw", "schedule_free_sgd", "schedule_free_radam"),
    *("galore_adamw", "galore_adafactor", "apollo_adamw"),
    *("adamw_8bit", "paged_adamw_32bit", "lion_8bit", "rmsprop_bnb_8bit", "ademamix"),
    pytest.param("adamw_torch_8bit", marks=pytest.mark.slow),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_both_trainers_have_the_same_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"optim": name, "learning_rate": 0.01}
    settings |= TARGETS if name.startswith(("galore", "apollo")) else {}
    try:
        check_optimizer(make_args(tmp_path, **settings))
    except ImportError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(Tensor, "cuda", lambda self: self)  # adalomo's moments
    ours, theirs = both(tmp_path, scored("mlp"), **settings)

    if name.startswith("schedule_free"):  # upstream leaves the training weights in the model
        theirs.trainer.optimizer.eval()
    assert_same_weights(ours, theirs)
    assert logged(ours.trainer, "learning_rate") == logged(theirs.trainer, "learning_rate")
    assert logged(ours.trainer, "loss") == logged(theirs.trainer, "loss")
    if "lomo" not in name:  # upstream sees no gradients then, and logs 0
        assert logged(ours.trainer, "grad_norm") == logged(theirs.trainer, "grad_norm")
