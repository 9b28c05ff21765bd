"""States of callbacks go into a checkpoint and come back to the right objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.callbacks import (
    CallbackHandler,
    DefaultFlowCallback,
    EarlyStoppingCallback,
    ExportableState,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    export_callback_states,
    export_states,
    restore_callback_states,
)


class Counter(TrainerCallback, ExportableState):
    def __init__(self, label: str = "default") -> None:
        self.label, self.count = label, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.count += 1

    def state(self) -> dict[str, Any]:
        return {"args": {"label": self.label}, "attributes": {"count": self.count}}


def counter(label: str, count: int) -> Counter:
    made = Counter(label)
    made.count = count
    return made


def test_classes_with_several_objects_export_a_list() -> None:
    callbacks = [counter("a", 1), DefaultFlowCallback(), counter("b", 2), EarlyStoppingCallback()]
    assert export_callback_states(callbacks, TrainerControl()) == {
        "Counter": [
            {"args": {"label": "a"}, "attributes": {"count": 1}},
            {"args": {"label": "b"}, "attributes": {"count": 2}},
        ],
        "EarlyStoppingCallback": EarlyStoppingCallback().state(),
        "TrainerControl": TrainerControl().state(),
    }


def test_saving_again_does_not_add(tmp_path: Path) -> None:
    callbacks = [counter("a", 0), counter("b", 0)]
    state = TrainerState()
    path = tmp_path / "state.json"
    sizes = []
    for count in range(3):
        callbacks[0].count = count
        state.stateful_callbacks = export_callback_states(callbacks, TrainerControl())
        state.save_to_json(path)
        state = TrainerState.load_from_json(path)
        sizes.append([entry["attributes"] for entry in state.stateful_callbacks["Counter"]])
    assert sizes == [[{"count": count}, {"count": 0}] for count in range(3)]


def test_several_of_a_class_come_back_in_order_and_in_place() -> None:
    stored = export_callback_states(
        [counter("a", 1), counter("b", 2)], TrainerControl(should_log=True)
    )
    first, second, printer = Counter(), Counter(), PrinterCallback()
    callbacks: list[Any] = [DefaultFlowCallback(), first, second, printer]
    before = list(callbacks)
    control = TrainerControl()
    assert restore_callback_states(callbacks, control, stored) is control
    assert all(now is then for now, then in zip(callbacks, before, strict=True))
    assert [(item.label, item.count) for item in (first, second)] == [("a", 1), ("b", 2)]
    assert control == TrainerControl(should_log=True)


def test_a_callback_that_the_checkpoint_lacked_is_saved_next_time() -> None:
    stored = export_callback_states([counter("a", 1)], TrainerControl())
    callbacks: list[Any] = [EarlyStoppingCallback(), Counter()]
    control = restore_callback_states(callbacks, TrainerControl(), stored)
    assert callbacks[1].count == 1
    assert set(export_callback_states(callbacks, control)) == {
        "Counter",
        "EarlyStoppingCallback",
        "TrainerControl",
    }


def test_stored_but_absent_ones_are_named(caplog: pytest.LogCaptureFixture) -> None:
    stored = export_callback_states([Counter(), EarlyStoppingCallback()], TrainerControl())
    restore_callback_states([PrinterCallback()], TrainerControl(), stored)
    assert len(caplog.messages) == 1
    assert "does not have: Counter, EarlyStoppingCallback." in caplog.messages[0]


def test_lists_that_transformers_let_grow_give_their_newest_states(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stored = {"Counter": [counter(name, n).state() for n in (0, 2, 4) for name in ("a", "b")]}
    callbacks: list[Any] = [Counter(), Counter()]
    restore_callback_states(callbacks, TrainerControl(), stored)
    assert [(item.label, item.count) for item in callbacks] == [("a", 4), ("b", 4)]
    assert caplog.messages == []


@pytest.mark.parametrize(("stored_count", "present"), [(2, 1), (1, 2), (3, 2)])
def test_another_number_of_objects_is_warned_of(
    caplog: pytest.LogCaptureFixture, stored_count: int, present: int
) -> None:
    states = [counter("stored", 1 + n).state() for n in range(stored_count)]
    callbacks: list[Any] = [Counter() for _ in range(present)]
    restore_callback_states(callbacks, TrainerControl(), {"Counter": states})
    assert [item.count for item in callbacks] == [1, 2, 3][: min(stored_count, present)] + [
        0
    ] * max(0, present - stored_count)
    assert f"holds {stored_count} state(s) of Counter and this Trainer has {present}" in caplog.text


def test_the_handler_calls_what_was_restored() -> None:
    class Slotted(Counter):
        __slots__ = ("unused",)

    own = Slotted()
    handler = CallbackHandler([DefaultFlowCallback, own, PrinterCallback], None, None, None, None)
    handler._listeners_of("on_step_end")
    stored = {"Slotted": counter("a", 5).state()}
    restore_callback_states(handler.callbacks, TrainerControl(), stored)
    replaced = handler.callbacks[1]
    assert replaced is not own
    assert (replaced.label, replaced.count) == ("a", 5)
    handler.callbacks.pop(0)
    handler.on_step_end(None, TrainerState(), TrainerControl())
    assert replaced.count == 6


def test_callbacks_of_transformers_are_exported_and_restored() -> None:
    peer = pytest.importorskip("transformers.trainer_callback")
    guest = peer.EarlyStoppingCallback(3)
    guest.early_stopping_patience_counter = 2
    stored = export_callback_states([guest], TrainerControl())
    fresh = peer.EarlyStoppingCallback()
    restore_callback_states([fresh], TrainerControl(), stored)
    assert vars(fresh) == vars(guest)
    ours = EarlyStoppingCallback()
    restore_callback_states([ours], TrainerControl(), stored)
    assert vars(ours) == vars(guest)


def test_a_state_of_the_wrong_form_is_refused() -> None:
    class Wrong(Counter):
        def state(self) -> dict[str, Any]:
            return {"count": 1}

    with pytest.raises(TypeError, match=r'Wrong\.state\(\) must return \{"args".*got \{\'count'):
        export_states([Wrong()])


@pytest.mark.parametrize(
    "state",
    [{"args": {"colour": 1}, "attributes": {}}, {"attributes": {}}],
    ids=["name", "no args"],
)
def test_a_state_that_does_not_fit_the_constructor_is_named(state: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"cannot restore Counter from the checkpoint: building"):
        restore_callback_states([Counter()], TrainerControl(), {"Counter": state})
