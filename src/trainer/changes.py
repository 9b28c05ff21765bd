"""Whether a model is still what was recorded, asked before every update, and mostly answered at no cost."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from attrs import define, field, frozen

import trainstep as ts
from trainer.circumstances import Circumstances

OFTEN, LATELY = 3, 100
"""So many changes within so many updates are not worth recording anew for."""


@frozen
class Change:
    """What has changed, if anything, and whether it ends recording for good."""

    reason: str = ""
    final: bool = False


NOTHING = Change()


@define(eq=False)
class Changes:
    """Tells what others, and the forward pass itself, have changed in a model.

    Args:
        circumstances: of the model.
        handler: the callbacks, who count when code of others has run.
        against: gives all reasons why steps are not recorded.
    """

    circumstances: Circumstances
    handler: Any
    against: Callable[[], Iterable[str]]
    _last: Any = field(default=None, init=False)
    _seen: int = field(default=-1, init=False)
    _updates: int = field(default=0, init=False)
    _moved: str | None = field(default=None, init=False)
    _when: list[int] = field(factory=list, init=False)

    def found(self, recorded: Callable[[], bool]) -> Change:
        """Return what has changed since things were recorded.

        Args:
            recorded: whether anything is.
        """
        self._updates += 1
        moved, self._moved = self._moved, None
        if moved is not None and recorded():
            return self._judge(moved)
        if self.handler.interventions == self._seen:
            return NOTHING
        self._seen = self.handler.interventions
        look = self.circumstances.look()
        what = self._last and self.circumstances.difference(self._last, look)
        listened = self.handler.listens("on_pre_optimizer_step")
        if self._last is not None and what is None and not listened:
            return NOTHING
        self.take_in()
        if reasons := "; ".join(self.against()):
            return Change(reasons, final=True)
        return NOTHING if what is None else self._judge(what)

    @contextmanager
    def made_by_the_model(self, refused: bool) -> Iterator[None]:
        """Take in what the pass inside changes: that is what the model does.

        Of numbers, strings and flags that have moved the next ``found`` tells: other shapes of batches
        may have been recorded with what they were.

        Args:
            refused: it is rehearsed: numbers, strings and flags must stay, and are put back if it fails.

        Raises:
            CaptureError: if they do not stay.
        """
        look, before = self.circumstances.look(), self.circumstances.numbers()
        try:
            yield
            self._moved = self.circumstances.moved(before)
            if refused and self._moved is not None:
                raise ts.CaptureError(
                    f"the forward pass changes {self._moved} of the model in every step, which a recording "
                    "would not do again"
                )
        except BaseException:
            if refused:
                self.circumstances.put_back(before)
            raise
        self.circumstances.passed(look)
        self.take_in()

    def take_in(self) -> None:
        """Take things as they are."""
        look = self.circumstances.look()
        if self._last is None or look.sizes != self._last.sizes:
            self.circumstances.find()  # there are other things to look at
            look = self.circumstances.look()
        self._last = look

    def _judge(self, what: str) -> Change:
        self._when = [*self._when[1 - OFTEN :], self._updates]
        if len(self._when) == OFTEN and self._updates - self._when[0] < LATELY:
            return Change(
                f"{what} of the model was changed {OFTEN} times within {LATELY} updates, which a recording "
                "does not follow",
                final=True,
            )
        return Change(f"{what} of the model was changed")
