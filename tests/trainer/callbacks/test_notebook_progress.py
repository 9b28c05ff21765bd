"""Progress in notebooks, with stand-ins for IPython and its widgets."""

from __future__ import annotations

import builtins
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from trainer.callbacks import (
    NotebookProgressCallback,
    ProgressCallback,
    TrainerControl,
    TrainerState,
    default_progress_callback,
    in_notebook,
)
from trainer.callbacks.notebook import HtmlBar


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stand in for IPython without ipywidgets; return the drawings of each display, in order."""
    displays: list[list[str]] = []

    def display(drawing: str, display_id: bool) -> SimpleNamespace:
        displays.append([drawing])
        return SimpleNamespace(update=displays[-1].append)

    ipython, module = ModuleType("IPython"), ModuleType("IPython.display")
    module.HTML, module.display = str, display  # type: ignore[attr-defined]
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    ipython.get_ipython = lambda: shell  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(HtmlBar, "redraw_every", 0.0)
    return displays


def test_a_terminal_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not in_notebook()
    assert default_progress_callback() is ProgressCallback
    for shell in (None, SimpleNamespace(config={"TerminalIPythonApp": {}})):
        module = SimpleNamespace(get_ipython=lambda shell=shell: shell)
        monkeypatch.setitem(sys.modules, "IPython", module)
        assert not in_notebook()


def test_a_kernel_is_a_notebook(shown: list[list[str]]) -> None:
    assert in_notebook()
    assert default_progress_callback() is NotebookProgressCallback


def test_bar_and_table_are_drawn_in_place(shown: list[list[str]]) -> None:
    progress = NotebookProgressCallback(max_str_len=3)
    state = TrainerState(max_steps=2)
    progress.on_train_begin(None, state, TrainerControl())
    state.global_step = 1
    progress.on_step_end(None, state, TrainerControl())
    progress.on_log(None, state, TrainerControl(), logs={"loss": 0.25, "note": "<b>"})
    progress.on_log(None, state, TrainerControl(), logs={"eval_loss": 0.5})
    progress.on_train_end(None, state, TrainerControl())
    (training,) = shown
    assert training[0] == "<div><progress max='2' value='0'></progress> 0/2</div>"
    assert training[1] == "<div><progress max='2' value='1'></progress> 1/2</div>"
    assert training[-1] == training[1] + (
        "<table><thead><tr><th>step</th><th>loss</th><th>note</th><th>eval_loss</th></tr></thead>"
        "<tbody><tr><td>1</td><td>0.25</td><td>&lt;b&gt;</td><td></td></tr>"
        "<tr><td>1</td><td></td><td></td><td>0.5</td></tr></tbody></table>"
    )


def test_the_bar_of_an_evaluation_inside_a_training_disappears(shown: list[list[str]]) -> None:
    progress = NotebookProgressCallback()
    progress.on_train_begin(None, TrainerState(), TrainerControl())
    progress.on_prediction_step(None, TrainerState(), TrainerControl())
    progress.on_evaluate(None, TrainerState(), TrainerControl())
    assert shown[1][1] == "<div><progress></progress> 1/?</div>"
    assert shown[1][-1] == ""


def test_drawing_is_throttled(shown: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HtmlBar, "redraw_every", 1e9)
    bar = HtmlBar(1000)
    for _ in range(1000):
        bar.update()
    bar.close()
    assert len(shown[0]) == 2
    assert "1000/1000" in shown[0][-1]


def test_lines_of_text_go_into_the_table(shown: list[list[str]]) -> None:
    HtmlBar(1).write("hello")
    assert "<th>message</th>" in shown[0][-1]
    assert "<td>hello</td>" in shown[0][-1]


def test_widgets_are_used_where_installed(
    shown: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    made: list[dict[str, Any]] = []

    def widget(**kwargs: Any) -> SimpleNamespace:
        made.append(kwargs)
        return SimpleNamespace(write=lines.append, update=lambda count: None, close=lambda: None)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "tqdm.notebook", SimpleNamespace(tqdm=widget))
    progress = NotebookProgressCallback()
    progress.on_train_begin(None, TrainerState(max_steps=3, global_step=1), TrainerControl())
    progress.on_log(None, TrainerState(), TrainerControl(), logs={"loss": 0.5})
    assert made == [{"total": 3, "initial": 1, "leave": True}]
    assert lines == ["{'loss': '0.5'}"]
    assert shown == []


def test_missing_ipython_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("IPython"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"needs IPython; install it \(pip install ipython\)"):
        HtmlBar(1)
