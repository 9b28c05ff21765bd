"""Show progress in a notebook: tqdm's widgets, or an HTML table where there are no widgets."""

from __future__ import annotations

import html
import importlib.util
import sys
import time
from typing import Any

from .base import TrainerCallback
from .progress import ProgressCallback


def in_notebook() -> bool:
    """Tell whether this code runs in a Jupyter kernel."""
    ipython = sys.modules.get("IPython")  # a kernel has loaded it
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config


def default_progress_callback() -> type[TrainerCallback]:
    """Return the class of progress callback that fits where this code runs."""
    return NotebookProgressCallback if in_notebook() else ProgressCallback


class NotebookProgressCallback(ProgressCallback):
    """A `ProgressCallback` for notebooks. Needs IPython; uses ipywidgets where installed."""

    def make_bar(self, total: int | None, initial: int = 0, leave: bool = True) -> Any:
        """Return a tqdm widget, or an `HtmlBar` without ipywidgets."""
        if importlib.util.find_spec("ipywidgets") is None:
            return HtmlBar(total, initial, leave)
        from tqdm.notebook import tqdm

        return tqdm(total=total, initial=initial, leave=leave)

    def show_record(self, record: dict[str, Any], step: int) -> None:
        """Add the record to the table, or write it above the widget."""
        if isinstance(self.training_bar, HtmlBar):
            self.training_bar.add_row({"step": step, **record})
        else:
            super().show_record(record, step)


class HtmlBar:
    """A progress bar with a table of records below it, redrawn in place.

    Args:
        total: Length of the bar; None if unknown.
        initial: Where it starts.
        leave: Whether it stays visible once closed.
    """

    redraw_every = 0.2  # seconds: drawing at every step would cost more than a small step

    def __init__(self, total: int | None, initial: int = 0, leave: bool = True) -> None:
        try:
            from IPython.display import HTML, display
        except ImportError as error:
            raise ImportError(
                "NotebookProgressCallback needs IPython; install it (pip install ipython) or use "
                "ProgressCallback"
            ) from error
        self.total, self.done, self.leave = total, initial, leave
        self.rows: list[dict[str, Any]] = []
        self._html = HTML
        self._handle = display(HTML(self.render()), display_id=True)
        self._drawn = time.monotonic()

    def update(self, count: int = 1) -> None:
        """Move on by `count`; drawn at most every `redraw_every` seconds."""
        self.done += count
        if time.monotonic() - self._drawn >= self.redraw_every:
            self.draw()

    def add_row(self, row: dict[str, Any]) -> None:
        """Add a record to the table and draw."""
        self.rows.append(row)
        self.draw()

    def write(self, text: str) -> None:
        """Add a line of text to the table and draw."""
        self.add_row({"message": text})

    def close(self) -> None:
        """Draw the final state, or nothing if the bar is not to stay."""
        self._handle.update(self._html(self.render() if self.leave else ""))

    def draw(self) -> None:
        """Redraw the bar and the table."""
        self._handle.update(self._html(self.render()))
        self._drawn = time.monotonic()

    def render(self) -> str:
        """Return the HTML of bar and table."""
        total = "" if self.total is None else f" max='{self.total}' value='{self.done}'"
        label = f"{self.done}/{'?' if self.total is None else self.total}"
        bar = f"<div><progress{total}></progress> {label}</div>"
        if not self.rows:
            return bar
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        head = _row("th", columns)
        body = "".join(_row("td", [row.get(name, "") for name in columns]) for row in self.rows)
        return f"{bar}<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def _row(tag: str, cells: list[Any]) -> str:
    inner = "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)
    return f"<tr>{inner}</tr>"
