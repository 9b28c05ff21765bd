"""One way to declare a field, so that its help, choices and checks are read from one place."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

OWN = "trainer_option"
"""Metadata key that marks a field declared here, as opposed to one that a user's subclass adds."""


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    choices: Iterable[Any] | None = None,
    factory: Callable[[], Any] | None = None,
    secret: bool = False,
) -> Any:
    """Declare a dataclass field with a help text.

    Args:
        default: Its default value; leave it out when ``factory`` is given.
        help: One or two sentences for ``--help``, without a percent sign (argparse formats it).
        choices: Valid values, checked on the command line and at construction (``None`` always passes).
        factory: Makes the default of a field whose default is mutable or read from the environment.
        secret: Keep the value out of the generated ``repr`` of subclasses.
    """
    metadata: dict[str, Any] = {"help": help, OWN: True}
    if choices is not None:
        metadata["choices"] = tuple(choices)
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata, repr=not secret)
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)
