"""The control switches."""

from __future__ import annotations

import pytest

from trainer.callbacks import ExportableState, TrainerControl


@pytest.mark.parametrize(
    ("method", "cleared"),
    [
        ("_new_training", {"should_training_stop"}),
        ("_new_epoch", {"should_epoch_stop"}),
        ("_new_step", {"should_save", "should_evaluate", "should_log"}),
    ],
)
def test_resets(method: str, cleared: set[str]) -> None:
    control = TrainerControl(True, True, True, True, True)
    getattr(control, method)()
    assert {name for name, on in vars(control).items() if not on} == cleared


def test_state_is_that_of_transformers_and_comes_back() -> None:
    peer = pytest.importorskip("transformers.trainer_callback")
    switches = {"should_save": True, "should_epoch_stop": True}
    control = TrainerControl(**switches)
    assert control.state() == peer.TrainerControl(**switches).state()
    assert TrainerControl.from_state(control.state()) == control


def test_exportable_state_asks_for_the_method() -> None:
    class Forgetful(ExportableState):
        pass

    with pytest.raises(NotImplementedError, match=r"Forgetful .* does not define state\(\)"):
        Forgetful().state()
