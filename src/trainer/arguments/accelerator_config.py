"""The options that ``accelerator_config`` holds."""

import dataclasses
import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self


@dataclass
class AcceleratorConfig:
    """Options for accelerate's loaders and its gradient accumulation.

    Attributes:
        split_batches: Split each batch of the loader over the processes, instead of one batch for each.
        dispatch_batches: Let the main process read the data and send parts to the others. Every process
            reads its own here: True is refused with several processes, ``None`` and False are the same.
        even_batches: Without effect: no row is repeated to complete the last batches.
        use_seedable_sampler: Shuffle by a sampler that depends on the seed and the epoch alone.
        non_blocking: Copy batches to the device asynchronously (needs pinned memory).
        gradient_accumulation_kwargs: ``num_steps`` or ``sync_each_batch``.
        use_configured_state: Use the accelerate state that the script has already set up.
    """

    split_batches: bool = False
    dispatch_batches: bool | None = None
    even_batches: bool = True
    use_seedable_sampler: bool = True
    non_blocking: bool = False
    gradient_accumulation_kwargs: dict[str, Any] | None = None
    use_configured_state: bool = False

    @classmethod
    def from_dict(cls, values: dict[str, Any], error: type[Exception] = TypeError) -> Self:
        """Build the options from a dict.

        Raises:
            TypeError: The dict has an unknown key; ``error`` gives another type for this.
        """
        valid = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(valid))
        if unknown:
            raise error(
                f"accelerator_config has unknown keys {unknown}; valid keys are {', '.join(valid)}."
            )
        return cls(**values)

    @classmethod
    def from_json_file(cls, json_file: str | PathLike[str]) -> Self:
        """Build the options from a JSON file.

        Raises:
            ValueError: The file has an unknown key.
        """
        values = json.loads(Path(json_file).read_text(encoding="utf-8"))
        return cls.from_dict(values, error=ValueError)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as a new dict."""
        return dataclasses.asdict(self)

    def pop(self, key: str, default: Any = None) -> Any:
        """Remove an attribute and return its value, or ``default`` if there is none."""
        return self.__dict__.pop(key, default)


def as_accelerator_config(value: Any) -> AcceleratorConfig:
    """Turn what ``accelerator_config`` accepts into an :class:`AcceleratorConfig`.

    Accepted are ``None``, a dict, the path of a JSON file, an instance, or another library's dataclass
    with the same fields.

    Raises:
        NotImplementedError: A class was given instead of an instance.
        TypeError: A dict has unknown keys, or the value is of another type.
        ValueError: A JSON file has unknown keys.
    """
    if isinstance(value, type):
        raise NotImplementedError(
            f"accelerator_config must be an instance, got the class {value.__name__}; "
            f"pass {value.__name__}(...) or a dict instead."
        )
    if value is None:
        return AcceleratorConfig()
    if isinstance(value, AcceleratorConfig):
        return value
    if dataclasses.is_dataclass(value):
        return AcceleratorConfig.from_dict(dict(vars(value)))
    if isinstance(value, dict):
        return AcceleratorConfig.from_dict(value)
    if isinstance(value, str | PathLike):
        return AcceleratorConfig.from_json_file(value)
    raise TypeError(
        "accelerator_config must be None, a dict, the path of a JSON file or an AcceleratorConfig, "
        f"got {type(value).__name__}."
    )
