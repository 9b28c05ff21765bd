"""What an optimizer's builder is given: the name, the arguments, the options' text, the model."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from attrs import define, field, frozen
from torch import nn

Found = tuple[Any, dict[str, Any]]
Builder = Callable[["Request"], Found]

_TRUE = ("true", "1", "yes", "y", "on", "t")
_FALSE = ("false", "0", "no", "n", "off", "f")


@define(eq=False)
class Options:
    """``optim_args``: text, of which each builder takes what its optimizer knows, converted."""

    _given: dict[str, str]
    _known: list[str] = field(factory=list, init=False)

    @classmethod
    def parse(cls, text: str | None) -> "Options":
        """Parse ``"momentum=0.9, nesterov=True"``; blanks do not count.

        Raises:
            ValueError: naming a part without ``=``.
        """
        given = {}
        for part in (text or "").replace(" ", "").split(","):
            if part:
                key, equals, value = part.partition("=")
                if not equals:
                    raise ValueError(f"optim_args: expected key=value, got {part!r} in {text!r}")
                given[key] = value
        return cls(given)

    def take(self, **kinds: Callable[[str], Any]) -> dict[str, Any]:
        """Take those options that are given out of the named ones.

        Raises:
            ValueError: for text that cannot be converted.
        """
        self._known += kinds
        return {
            key: _convert(key, self._given.pop(key), kind)
            for key, kind in kinds.items()
            if key in self._given
        }

    def get(self, key: str, kind: Callable[[str], Any], default: Any) -> Any:
        """Take one option, which has a default."""
        return self.take(**{key: kind}).get(key, default)

    def finish(self, name: str) -> None:
        """Raise ValueError if an option is left that the optimizer does not take."""
        if self._given:
            known = ", ".join(self._known) or "none"
            raise ValueError(
                f"optim_args: {name} does not take {', '.join(self._given)}; its options are: {known}"
            )


@frozen
class Request:
    """What a builder works with.

    Attributes:
        name: the value of ``args.optim``.
        args: the training arguments.
        options: ``args.optim_args``.
        model: what will be trained; None while arguments are only checked.
    """

    name: str
    args: Any
    options: Options
    model: nn.Module | None

    @property
    def adam(self) -> dict[str, Any]:
        """The options that all kinds of Adam share."""
        args = self.args
        return {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}

    def need(self, module: str, package: str, extra: str | None = None) -> Any:
        """Import an optional library.

        Args:
            module: what to import.
            package: the name that it is known by.
            extra: ours that installs it; None if no package index has it.

        Raises:
            ImportError: saying what to install.
        """
        try:
            return importlib.import_module(module)
        except ImportError as error:
            how = f"pip install 'trainstep[{extra}]'" if extra else "see that project's own page"
            raise ImportError(
                f"optim={self.name!r} needs the package {package}, and importing {module} failed "
                f"({error}). To install it: {how}"
            ) from error


def truth(text: str) -> bool:
    """Convert text to a bool."""
    if text.lower() not in _TRUE + _FALSE:
        raise ValueError(f"expected True or False, got {text!r}")
    return text.lower() in _TRUE


def dtype(text: str) -> torch.dtype:
    """Convert text such as ``bfloat16`` to PyTorch's type."""
    found = getattr(torch, text, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"expected the name of a torch dtype, got {text!r}")
    return found


def _convert(key: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"optim_args: {key}: {error}") from error
