"""What collators share, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import trainer.data.collators as collators
from trainer.data.collators import DataCollatorMixin

NAMES = [
    "default_data_collator",
    "DefaultDataCollator",
    "DataCollatorWithPadding",
    "DataCollatorForTokenClassification",
    "DataCollatorForMultipleChoice",
    "DataCollatorForSeq2Seq",
    "DataCollatorForLanguageModeling",
    "DataCollatorForWholeWordMask",
    "DataCollatorForSOP",
    "DataCollatorForPermutationLanguageModeling",
    "DataCollatorWithFlattening",
    "DataCollatorMixin",
    "DataCollator",
]


class Echo(DataCollatorMixin):
    def torch_call(self, features):
        return ("torch", features)


class Both(Echo):
    return_tensors = "np"

    def numpy_call(self, features):
        return ("numpy", features)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_exported(name):
    assert name in collators.__all__
    assert getattr(collators, name) is not None


@pytest.mark.row(56)
@pytest.mark.parametrize(
    "name", [n for n in NAMES if n not in ("DataCollatorMixin", "DataCollator")]
)
def test_parameters_and_defaults_are_upstreams(hf, name):
    """Names, order, kinds and defaults of the parameters."""
    import inspect

    from transformers.data import data_collator

    def parameters(thing):
        return [(p.name, p.kind, p.default) for p in inspect.signature(thing).parameters.values()]

    assert parameters(getattr(collators, name)) == parameters(getattr(data_collator, name))


def test_import_loads_neither_transformers_nor_its_kin():
    code = (
        "import sys, trainer.data.collators\n"
        "print(sorted({'transformers', 'tokenizers', 'datasets'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_call_dispatches_and_the_argument_goes_before_the_attribute():
    assert Echo()([1]) == ("torch", [1])
    assert Both()([1]) == ("numpy", [1])
    assert Both()([1], return_tensors="pt") == ("torch", [1])


def test_a_missing_implementation_says_which():
    with pytest.raises(NotImplementedError, match=r"Echo has no numpy_call.*return_tensors='pt'"):
        Echo()([1], return_tensors="np")
    with pytest.raises(NotImplementedError, match=r"DataCollatorMixin has no torch_call"):
        DataCollatorMixin()([1])


def test_an_unknown_framework_lists_the_known():
    with pytest.raises(
        ValueError, match=r"Echo: return_tensors must be one of 'pt', 'np', got 'tf'"
    ):
        Echo()([1], return_tensors="tf")


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match=r"Echo: the list of rows is empty"):
        Echo()([])


@pytest.mark.parametrize("features", [{"input_ids": [[1]]}, "text", 3, iter([1])])
def test_what_is_not_a_list_of_rows_is_refused(features):
    kind = type(features).__name__
    with pytest.raises(TypeError, match=rf"Echo: expected a list of dataset rows, got {kind}"):
        Echo()(features)
