"""Where PyTorch's compiler leaves a function in several parts, in words.

It is read from what the compiler notes for the whole process. The list of breaks is no public name:
without it they are not told, and nothing fails.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from attrs import define, field

_TORCH = torch.__path__[0]
_WRAPPERS = (
    f"{_TORCH}/nn/parallel/",
    f"{_TORCH}/distributed/fsdp/",
    f"{_TORCH}/distributed/_composable/",
)
_CONTEXTS = (contextlib.__file__, f"{_TORCH}/_dynamo/")
_SKIPPED = re.compile(r"frame skipped: (.+) \((.+) line (\d+)\)")


def _counters() -> Any:
    from torch._dynamo.utils import counters  # takes seconds; torch.compile has imported it

    return counters


def _breaks() -> Any:
    from torch._dynamo import utils

    return getattr(utils, "graph_break_reasons", ())


@define(eq=False)
class GraphBreaks:
    """Places that the compiler could not pass, told once each.

    Use: ``before = breaks.mark()``, call something compiled, and ``breaks.met()`` if ``breaks.count`` has
    become another than ``before``. Where nothing was compiled, that takes about half a microsecond.
    """

    _counters: Any = field(factory=_counters, init=False)
    _all: Any = field(factory=_breaks, init=False)
    _seen: int = field(default=-1, init=False)
    _listed: int = field(default=0, init=False)
    _given_up: int = field(default=0, init=False)
    _refused: Mapping[str, int] = field(factory=dict, init=False)
    _told: set[str] = field(factory=set, init=False)

    @property
    def count(self) -> int:
        """How many functions this process has tried to compile."""
        count: int = self._counters["frames"]["total"]
        return count

    def mark(self) -> int:
        """Remember what there is, so that it is not taken for what comes next; returns ``count``."""
        count = self.count
        if count != self._seen or len(self._all) != self._listed:
            self._seen, self._listed = count, len(self._all)
            self._given_up, self._refused = self._failures(), dict(self._counters["unimplemented"])
        return count

    def met(self) -> list[str]:
        """Return what has come since ``mark``, without what was returned before."""
        new = [text for text in dict.fromkeys(self._since()) if text not in self._told]
        self._told.update(new)
        return new

    def _since(self) -> Iterator[str]:
        for reason in self._all[self._listed :]:
            if not _wrappers(reason):
                yield _described(reason)
        # Where a break is in a loop, all of the function runs as it is.
        if self._failures() > self._given_up:
            refused = self._counters["unimplemented"].items()
            new = [text for text, count in refused if count > self._refused.get(text, 0)]
            for found in filter(None, map(_SKIPPED.search, new)):
                yield _skipped(found)

    def _failures(self) -> int:
        frames = self._counters["frames"]
        failures: int = frames["total"] - frames["ok"]
        return failures


def _described(reason: Any) -> str:
    text = _short(reason.reason)
    if text.startswith("generic_jump"):
        text = "what comes next depends on the value of a tensor"
    if not reason.user_stack:
        return text
    frame = reason.user_stack[-1]
    return f"{frame.filename}:{frame.lineno} ({frame.line}): {text}"


def _skipped(found: re.Match[str]) -> str:
    name, file, line = found.groups()
    why = _short(found.string)
    return f"{file}:{line} ({name}, none of which is compiled, for a break in a loop): {why}"


def _wrappers(reason: Any) -> bool:
    """Whether a break is one that PyTorch's wrappers for several processes bring along, or ask for."""
    if reason.reason.startswith("DDPOptimizer"):
        return True
    files = [frame.filename for frame in reason.user_stack]
    # They enter contexts, in the compiler's own words.
    places = [file for file in files if not file.startswith(_CONTEXTS)]
    return bool(files) and (not places or places[-1].startswith(_WRAPPERS))


def _short(text: str) -> str:
    return " ".join(text.split("Hint:")[0].split())[:300]
