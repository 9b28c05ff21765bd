"""The handler fires each event, in order, on those that listen, with the right switches reset."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from trainer.callbacks import (
    EVENTS,
    CallbackHandler,
    DefaultFlowCallback,
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

MICRO_STEPS = ["step_begin", "substep_end", "pre_optimizer_step", "optimizer_step"]
EVALUATION = ["prediction_step", "prediction_step", "log", "evaluate"]
TRACE = [
    *["init_end", "train_begin", "epoch_begin"],
    *[*MICRO_STEPS, "step_end(1, 0.4)", "log"],
    *[*MICRO_STEPS, "step_end(2, 0.8)", "log", *EVALUATION, "save"],
    *["step_begin", "pre_optimizer_step", "optimizer_step", "step_end(3, 1.0)", "log"],
    *[*EVALUATION, "save"],
    *["epoch_end", "log", "train_end"],
]


def recorder(base: type) -> Any:
    """Return an object of a subclass of `base` that writes each event into its `trace`."""

    def record(event: str) -> Callable[..., None]:
        def method(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            name = event.removeprefix("on_")
            where = f"({state.global_step}, {state.epoch})" if name == "step_end" else ""
            self.trace.append(name + where)
            self.kwargs = kwargs

        return method

    kind = type("Recorder", (base,), {event: record(event) for event in EVENTS})
    instance = kind()
    instance.trace = []
    return instance


def make_handler(*callbacks: Any) -> CallbackHandler:
    return CallbackHandler(
        [DefaultFlowCallback, *callbacks], "model", "processor", "optimizer", "scheduler"
    )


TRACE_ARGS = {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}


@pytest.mark.row(115)
def test_events_of_a_training_come_in_the_documented_order(make_args: Any, run_loop: Any) -> None:
    seen = recorder(TrainerCallback)
    handler = make_handler(seen)
    run_loop(
        *(handler, make_args(**TRACE_ARGS), TrainerState(), TrainerControl()),
        batches=5,
        window=2,
        epochs=1,
    )
    assert seen.trace == TRACE


def test_transformers_handler_gives_the_same_trace(make_args: Any, run_loop: Any) -> None:
    peer = pytest.importorskip("transformers.trainer_callback")
    seen = recorder(peer.TrainerCallback)
    handler = peer.CallbackHandler([peer.DefaultFlowCallback, seen], None, None, None, None)
    run_loop(
        *(handler, make_args(**TRACE_ARGS), peer.TrainerState(), peer.TrainerControl()),
        batches=5,
        window=2,
        epochs=1,
    )
    assert seen.trace == TRACE


def test_callbacks_of_transformers_are_called_as_they_are(make_args: Any, run_loop: Any) -> None:
    peer = pytest.importorskip("transformers.trainer_callback")
    seen = recorder(peer.TrainerCallback)
    handler = CallbackHandler([peer.DefaultFlowCallback(), seen], None, None, None, None)
    run_loop(
        *(handler, make_args(**TRACE_ARGS), TrainerState(), TrainerControl()),
        batches=5,
        window=2,
        epochs=1,
    )
    assert seen.trace == TRACE


def test_there_are_sixteen_events_and_the_handler_has_each() -> None:
    assert len(EVENTS) == 16
    assert all(callable(getattr(CallbackHandler, event)) for event in EVENTS)


@pytest.mark.parametrize("event", EVENTS)
def test_every_event_passes_the_same_keywords(event: str, make_args: Any) -> None:
    extra = {"on_log": {"logs": {"a": 1}}, "on_evaluate": {"metrics": {"a": 1}}}
    extra["on_predict"] = extra["on_evaluate"]
    seen = recorder(TrainerCallback)
    handler = make_handler(seen)
    handler.train_dataloader, handler.eval_dataloader = "train", "eval"
    getattr(handler, event)(
        make_args(), TrainerState(), TrainerControl(), **extra.get(event, {}), more=3
    )
    assert seen.kwargs == {
        "model": "model",
        "processing_class": "processor",
        "optimizer": "optimizer",
        "lr_scheduler": "scheduler",
        "train_dataloader": "train",
        "eval_dataloader": "eval",
        "more": 3,
        **extra.get(event, {}),
    }


RESETS = {
    "on_train_begin": {"should_training_stop"},
    "on_epoch_begin": {"should_epoch_stop"},
    "on_step_begin": {"should_log", "should_evaluate", "should_save"},
    "on_evaluate": {"should_evaluate"},
    "on_save": {"should_save"},
    "on_log": {"should_log"},
}


@pytest.mark.row(116)
@pytest.mark.parametrize("event", EVENTS)
def test_an_event_resets_its_switches_before_the_callbacks_run(event: str) -> None:
    at_call: list[dict[str, bool]] = []

    def note(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        at_call.append(dict(vars(control)))

    watcher = TrainerCallback()
    setattr(watcher, event, note)
    handler = CallbackHandler([watcher], None, None, None, None)
    control = TrainerControl(True, True, True, True, True)
    given: Any = {"on_log": ({},), "on_evaluate": ({},), "on_predict": ({},)}.get(event, ())
    assert getattr(handler, event)(None, TrainerState(), control, *given) is control
    assert {name for name, on in at_call[0].items() if not on} == RESETS.get(event, set())
    assert at_call == [vars(control)]


def test_a_returned_control_replaces_the_one_in_use() -> None:
    replacement = TrainerControl(should_save=True)
    given: list[Any] = []

    class Replace(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> TrainerControl:
            return replacement

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            given.append(control)

    handler = CallbackHandler([Replace, Watch], None, None, None, None)
    assert handler.on_step_end(None, TrainerState(), TrainerControl()) is replacement
    assert given == [replacement]


def test_returning_something_else_names_callback_event_and_value() -> None:
    class Wrong(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> Any:
            return True

    handler = CallbackHandler([Wrong], None, None, None, None)
    with pytest.raises(TypeError, match=r"Wrong\.on_step_end returned True \(bool\).*None or the"):
        handler.on_step_end(None, TrainerState(), TrainerControl())


def test_objects_with_some_events_only_are_callbacks_too() -> None:
    class Plain:
        calls = 0

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.calls += 1

    plain = Plain()
    handler = make_handler(plain)
    for event in ("on_train_begin", "on_save", "on_train_end"):
        getattr(handler, event)(None, TrainerState(), TrainerControl())
    assert plain.calls == 1


def test_an_object_without_events_is_refused() -> None:
    with pytest.raises(TypeError, match=r"got int, which has none of on_init_end, on_train_begin"):
        make_handler(3)


def test_events_that_nobody_overrides_have_no_listeners() -> None:
    peer = pytest.importorskip("transformers.trainer_callback")
    guest = type("Guest", (peer.TrainerCallback,), {"on_save": lambda *args, **kwargs: None})()
    handler = make_handler(TrainerCallback, guest)
    assert handler._listeners_of("on_step_begin") == ()
    assert handler._listeners_of("on_save") == (guest,)
    assert [type(item) for item in handler._listeners_of("on_step_end")] == [DefaultFlowCallback]


def test_changes_of_the_list_itself_are_seen() -> None:
    handler = make_handler()
    first, second = recorder(TrainerCallback), recorder(TrainerCallback)

    def save() -> None:
        handler.on_save(None, TrainerState(), TrainerControl())

    save()
    handler.callbacks.append(first)
    save()
    handler.callbacks[1] = second
    save()
    handler.callbacks = [first]
    save()
    assert (first.trace, second.trace) == (["save", "save"], ["save"])


def test_a_method_set_on_a_callback_is_found_at_the_next_training() -> None:
    callback = TrainerCallback()
    handler = make_handler(callback)
    calls: list[str] = []
    handler.on_save(None, TrainerState(), TrainerControl())
    callback.on_save = lambda *args, **kwargs: calls.append("save")  # type: ignore[method-assign]
    handler.on_train_begin(None, TrainerState(), TrainerControl())
    handler.on_save(None, TrainerState(), TrainerControl())
    assert calls == ["save"]


def test_a_callback_may_remove_itself_during_an_event() -> None:
    class Once(TrainerCallback):
        def on_save(self, *args: Any, **kwargs: Any) -> None:
            handler.remove_callback(self)

    after = recorder(TrainerCallback)
    handler = make_handler(Once, after)
    for _ in range(2):
        handler.on_save(None, TrainerState(), TrainerControl())
    assert after.trace == ["save", "save"]
    assert handler.callback_list == "DefaultFlowCallback\nRecorder"


def test_events_of_your_own_reach_those_that_have_them() -> None:
    class Own(TrainerCallback):
        def on_sample(self, args: Any, state: Any, control: Any, text: str, **kw: Any) -> None:
            self.text = text

    own = Own()
    make_handler(own).call_event("on_sample", None, TrainerState(), TrainerControl(), text="hi")
    assert own.text == "hi"


@pytest.mark.row(201)
def test_callbacks_share_a_copy_of_the_logs() -> None:
    class Change(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
            del logs["total_flos"]
            logs["perplexity"] = 2.0

    seen = recorder(TrainerCallback)
    record = {"loss": 0.5, "total_flos": 3.0}
    make_handler(Change, seen).on_log(None, TrainerState(), TrainerControl(), record)
    assert record == {"loss": 0.5, "total_flos": 3.0}
    assert seen.kwargs["logs"] == {"loss": 0.5, "perplexity": 2.0}


@pytest.mark.row(117)
def test_add_pop_and_remove_take_classes_and_objects() -> None:
    stop = EarlyStoppingCallback(3)
    handler = make_handler(stop, PrinterCallback)
    assert [type(item) for item in handler.callbacks] == [
        DefaultFlowCallback,
        EarlyStoppingCallback,
        PrinterCallback,
    ]
    assert handler.pop_callback(EarlyStoppingCallback) is stop
    assert handler.pop_callback(EarlyStoppingCallback) is None
    assert handler.pop_callback(stop) is None
    handler.add_callback(stop)
    assert handler.pop_callback(stop) is stop
    handler.remove_callback(EarlyStoppingCallback)
    handler.remove_callback(PrinterCallback)
    assert handler.callback_list == "DefaultFlowCallback"
    with pytest.raises(ValueError, match=r"EarlyStoppingCallback: it is not.*DefaultFlowCallback"):
        handler.remove_callback(stop)


@pytest.mark.row(117)
def test_a_second_callback_of_a_class_is_added_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    handler = make_handler(PrinterCallback)
    assert caplog.messages == []
    handler.add_callback(PrinterCallback)
    assert len(handler.callbacks) == 3
    assert "a PrinterCallback is added although there is one already" in caplog.text


@pytest.mark.row(119)
def test_no_default_flow_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    CallbackHandler([PrinterCallback], None, None, None, None)
    assert "no DefaultFlowCallback among the callbacks (PrinterCallback)" in caplog.text


def test_stopping_an_epoch_goes_on_with_the_next(make_args: Any, run_loop: Any) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_epoch_stop = state.global_step == 1

    seen = recorder(TrainerCallback)
    state = TrainerState()
    run_loop(
        *(make_handler(Stop, seen), make_args(save_strategy="no"), state, TrainerControl()),
        batches=3,
        window=1,
        epochs=2,
    )
    steps = [name for name in seen.trace if name.startswith(("step_end", "epoch"))]
    assert steps == [
        *["epoch_begin", f"step_end(1, {1 / 3})", "epoch_end"],
        *["epoch_begin", f"step_end(2, {1 + 1 / 3})", f"step_end(3, {1 + 2 / 3})"],
        *["step_end(4, 2.0)", "epoch_end"],
    ]


def test_a_callback_asks_for_log_evaluation_and_save_without_strategies(
    make_args: Any, run_loop: Any
) -> None:
    class Ask(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                control.should_log = control.should_evaluate = control.should_save = True

    seen = recorder(TrainerCallback)
    args = make_args(save_strategy="no", logging_strategy="no")
    run_loop(
        *(make_handler(Ask, seen), args, TrainerState(), TrainerControl()),
        batches=4,
        window=1,
        epochs=1,
    )
    start = seen.trace.index("step_end(2, 0.5)")
    assert seen.trace[start + 1 : start + 8] == ["log", *EVALUATION, "save", "step_begin"]
    assert seen.trace.count("save") == 1


def test_importing_the_callbacks_imports_no_optional_library() -> None:
    code = (
        "import sys, trainer.callbacks; "
        "print({'transformers', 'IPython', 'ipywidgets'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "set()\n"


def test_loggers_belong_to_the_modules() -> None:
    from trainer.callbacks import handler

    assert handler.logger is logging.getLogger("trainer.callbacks.handler")
