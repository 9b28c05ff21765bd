"""What transformers reads on the host about masks, in steps that are recorded.

In every forward pass of an eager model it asks whether a mask hides anything at all, or sequences are
packed, and chooses kernels by the answer. A recording has one answer. So batches whose masks hide something
and those whose masks hide nothing are recorded apart, with the answers that their rehearsals got; and
every replay notes on the device whether its answers would have been the same.
"""

import sys
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from attrs import define, field
from torch import Tensor
from torch.overrides import TorchFunctionMode

import trainstep as ts
from trainstep.stages import Note

_ASKING = "transformers.masking_utils"


@define(eq=False)
class HostReads:
    """Answers what is read on the host while a step is recorded, as it was in the rehearsal.

    Attributes:
        device: of the model.
        asked: whether the model has asked anything in its first rehearsal; None before.
    """

    device: torch.device
    asked: bool | None = field(default=None, init=False)
    _answers: dict[Hashable, list[bool]] = field(factory=dict, init=False)
    _wrong: Tensor | None = field(default=None, init=False)

    @contextmanager
    def rehearsed(self, which: Hashable) -> Iterator[None]:
        """Let what runs inside read, and remember the answers under ``which``."""
        answers: list[bool] = []

        def answer(question: Tensor) -> bool:
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("default")
            try:
                answers.append(bool(question))
            finally:
                torch.cuda.set_sync_debug_mode(before)
            return answers[-1]

        with _Asked(answer):
            yield
        self._answers[which] = answers
        self.asked = bool(answers) if self.asked is None else self.asked
        if answers and self._wrong is None:
            self._wrong = torch.zeros((), dtype=torch.bool, device=self.device)

    @contextmanager
    def recorded(self, which: Hashable) -> Iterator[None]:
        """Give what runs inside the same answers, and record whether they would be the same.

        Raises:
            CaptureError: if there are other questions than in the rehearsal.
        """
        answers = self._answers.get(which, [])
        questions: list[Tensor] = []

        def answer(question: Tensor) -> bool:
            if len(questions) == len(answers):
                raise ts.CaptureError("more is read on the host than in the step before")
            questions.append(question)
            return answers[len(questions) - 1]

        with _Asked(answer):
            yield
        if len(questions) < len(answers):
            raise ts.CaptureError("less is read on the host than in the step before")
        for question, expected in zip(questions, answers, strict=True):
            assert self._wrong is not None
            self._wrong.logical_or_(question.reshape(()).bool() != expected)

    def check(self) -> None:
        """Make sure that all replays so far took the kernels that the model would have taken.

        Waits for the device if there were questions at all.

        Raises:
            RuntimeError: if one did not.
        """
        if self._wrong is not None and bool(self._wrong):
            raise RuntimeError(
                "steps that were replayed from CUDA graphs took attention's kernels for another mask than "
                "the batches had: the model makes masks in a way that is not known here. Results since the "
                "last log or checkpoint are not those of the model. Train with "
                'TrainingArguments(capture="off"), from the last checkpoint.'
            )


def facts(batch: Any) -> tuple[Note, ...] | None:
    """Say which masks of a batch hide something, which decides what a model finds out about it.

    None if that is not known: for masks that are on a device already, where positions are the batch's
    own, and for batches that are no mappings.
    """
    if not isinstance(batch, Mapping) or "position_ids" in batch:
        return None
    masks = {name: mask for name, mask in batch.items() if "mask" in str(name)}
    if not all(isinstance(mask, Tensor) and mask.device.type == "cpu" for mask in masks.values()):
        return None
    return tuple(
        Note(f"{name} hides {'nothing' if mask.all() else 'something'}")
        for name, mask in masks.items()
    )


class _Asked(TorchFunctionMode):
    """Sends questions that are asked in ``transformers.masking_utils`` to ``answer``."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self._answer = answer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "__bool__" and _asks(sys._getframe(1)):
            return self._answer(args[0])
        return func(*args, **(kwargs or {}))


def _asks(frame: Any) -> bool:
    return frame is not None and frame.f_globals.get("__name__") == _ASKING
