"""What commands give back, and how numbers are shown."""

from collections.abc import Sequence
from typing import Any

from attrs import frozen

SAME, DIFFERENT, TROUBLE = 0, 1, 2
"""Exit statuses, as those of ``diff``: nothing to report, something found, could not be done."""


class Refusal(Exception):
    """What was asked for cannot be done; the message goes to standard error, on one line."""


@frozen
class Result:
    """The outcome of a command.

    Attributes:
        status: the exit status.
        data: what ``--json`` prints.
        text: what is printed otherwise, line by line.
    """

    status: int
    data: dict[str, Any]
    text: list[str]


def size(count: int) -> str:
    """Return a number of bytes for people: 1,234 B, 5.2 MB; the units are powers of 1000."""
    if count < 10_000:
        return f"{count:,} B"
    value, units = count / 1000, ["kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:,.1f} {units[0]}"


def columns(rows: Sequence[Sequence[str]], indent: str = "  ") -> list[str]:
    """Align the cells of a table to the left; the last one is not padded."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        (indent + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]


def one_line(error: BaseException | str) -> str:
    """Return a message without line breaks."""
    return " ".join(str(error).split())
