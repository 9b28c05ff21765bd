"""Leaving out columns that the model does not take."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger(__name__)

LABELS = ("label", "label_ids", "labels")
"""Columns that are kept whatever the model takes: collators make ``labels`` of them, and losses use it."""


def names_in(dataset: Any) -> list[str] | None:
    """Return the columns of a table, or the keys of a list's first sample; None where that is unknown."""
    names = getattr(dataset, "column_names", None)
    if names is None and isinstance(dataset, list) and dataset and isinstance(dataset[0], Mapping):
        names = list(dataset[0])
    return names if isinstance(names, list) else None


def keep_columns(dataset: Any, signature: list[str], what: str) -> Any:
    """Drop the columns of a ``datasets.Dataset`` that are not in ``signature``.

    Other datasets are returned as they are; see ``FilteringCollator``.

    Raises:
        ValueError: if no column is left.
    """
    names = getattr(dataset, "column_names", None)
    if not isinstance(names, list) or not hasattr(dataset, "remove_columns"):
        return dataset
    kept = set(signature)
    ignored = [name for name in names if name not in kept]
    if names and len(ignored) == len(names):
        raise ValueError(
            f"none of the {what} dataset's columns ({', '.join(names)}) is a parameter of the model's "
            f"forward ({', '.join(signature)}). Rename the columns, or set "
            "remove_unused_columns=False to pass all of them."
        )
    if ignored:
        logger.info("The %s data's columns %s are not used.", what, ", ".join(ignored))
    return dataset.remove_columns(ignored) if ignored else dataset


class FilteringCollator:
    """Drops unused keys from samples that are dicts, then collates; picklable, for workers."""

    def __init__(self, collate: Callable[[list[Any]], Any], signature: list[str]) -> None:
        self.collate = collate
        self.signature = list(dict.fromkeys(signature))
        self.taken = [name for name in self.signature if name not in ("label", "label_ids")]
        self.kept = frozenset(signature)

    def __call__(self, samples: list[Any]) -> Any:
        """Collate the samples without the keys that the model does not take."""
        # Most samples are dicts of which all is taken; these checks do not leave C.
        if set(map(type, samples)) == {dict} and all(map(self.kept.issuperset, samples)):
            return self.collate(samples)
        return self.collate([self._filtered(sample) for sample in samples])

    def _filtered(self, sample: Any) -> Any:
        if not isinstance(sample, Mapping) or self.kept.issuperset(sample):
            return sample
        left = {key: value for key, value in sample.items() if key in self.kept}
        if not left:
            raise ValueError(
                f"the batch is empty: none of the data's keys ({', '.join(map(str, sample))}) reaches "
                f"the model, whose forward takes {', '.join(self.taken)}. Rename the keys, or set "
                "remove_unused_columns=False to pass all of them."
            )
        return left
