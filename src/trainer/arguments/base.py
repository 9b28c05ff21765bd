"""``TrainingArguments``: every field, assembled from the mixins of :mod:`.fields`."""

from dataclasses import dataclass
from typing import ClassVar

from .derive import build_configs, convert_enums, derive_values, read_values
from .devices import DevicesMixin
from .fields import (
    ComputeFields,
    DataFields,
    DistributedFields,
    EvaluationFields,
    ExtensionFields,
    LoggingFields,
    OptimizerFields,
    SavingFields,
    TrainingFields,
)
from .legacy import LegacyNames
from .serialization import SerializationMixin
from .setters import SettersMixin
from .validation import validate


# Dataclass fields come in the reverse order of the bases, so ``output_dir`` is the first one.
@dataclass(repr=False)
class TrainingArguments(
    SettersMixin,
    SerializationMixin,
    DevicesMixin,
    LegacyNames,
    ExtensionFields,
    DistributedFields,
    DataFields,
    SavingFields,
    EvaluationFields,
    LoggingFields,
    ComputeFields,
    OptimizerFields,
    TrainingFields,
):
    """The settings of a training run, with the names of the Hugging Face arguments.

    Every field has a default; its ``metadata["help"]`` says what it means. Constructing reads text
    (numbers, JSON), turns names into enum members, derives what is left out and checks combinations.
    It touches no device, no process group and no folder: those wait for the first use of a property
    such as :attr:`device` or :attr:`world_size`.

    Fields can be assigned afterwards, unchecked; :meth:`normalize` checks again, and so does each
    ``set_*`` method. Subclass with ``@dataclass`` to add fields.

    Raises:
        ValueError: A value, or a combination of values, makes no sense.
        TypeError: A keyword is unknown; for names of version 4, the message names the replacement.
        NotImplementedError: ``accelerator_config`` is a class.
    """

    # Fields that are dicts and may be given as JSON text; a subclass adds its own to the list.
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        "accelerator_config",
        "fsdp_config",
        "deepspeed",
        "gradient_checkpointing_kwargs",
        "lr_scheduler_kwargs",
        "liger_kernel_config",
        "parallelism_config",
    ]

    def __post_init__(self) -> None:
        self.normalize()

    def normalize(self) -> None:
        """Convert, derive and check all fields; on normalised values this changes nothing.

        Raises:
            ValueError: A value, or a combination of values, makes no sense.
        """
        read_values(self)
        convert_enums(self)
        derive_values(self)
        validate(self)
        build_configs(self)
