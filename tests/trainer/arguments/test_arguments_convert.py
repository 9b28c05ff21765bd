"""Reading text and numbers."""

import json

import numpy as np
import pytest

from trainer.arguments import TrainingArguments
from trainer.arguments.convert import (
    as_mapping,
    as_scalar,
    convert_leaves,
    json_object,
    parse_bool,
    scalar_type,
)


@pytest.mark.parametrize("word", ["yes", "TRUE", "t", "Y", "1"])
def test_true_words(word):
    assert parse_bool(word) is True


@pytest.mark.parametrize("word", ["no", "False", "f", "N", "0"])
def test_false_words(word):
    assert parse_bool(word) is False


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("False", False),
        ("12", 12),
        ("-3", -3),
        ("1e-3", 1e-3),
        ("0.5", 0.5),
        ("-.5", -0.5),
        ("2.", 2.0),
        ("1E5", 1e5),
        ("auto", "auto"),
        ("1.2.3", "1.2.3"),
        ("nan", "nan"),
        ("", ""),
    ],
)
def test_leaves_that_spell_a_number_become_one(text, value):
    found = convert_leaves({"a": [text], "b": {"c": text}})
    assert found == {"a": [value], "b": {"c": value}}
    assert type(found["a"][0]) is type(value)


def test_json_object_must_be_an_object():
    assert json_object('{"a": "2", "b": null}') == {"a": 2, "b": None}
    with pytest.raises(ValueError, match=r"expected a JSON object, got '\[1\]'"):
        json_object("[1]")


def test_mapping_from_dict_text_and_file(tmp_path):
    path = tmp_path / "options.json"
    path.write_text(json.dumps({"a": "1.5"}))
    given = {"a": "1.5"}
    assert as_mapping("x", given) == given
    assert as_mapping("x", given) is not given
    assert as_mapping("x", ' {"a": "1.5"}') == as_mapping("x", path) == {"a": 1.5}
    assert as_mapping("x", str(path)) == {"a": 1.5}
    assert as_mapping("x", None) is None


@pytest.mark.parametrize("value", ["missing.json", 3, '{"a"', ["a"]])
def test_mapping_error_names_the_field(value):
    with pytest.raises(ValueError, match=r"^field_name: expected a "):
        as_mapping("field_name", value)


@pytest.mark.parametrize(
    ("annotation", "kind"),
    [(int, int), (bool | None, bool), (float, float), (str | bool, None), (str, None)],
)
def test_scalar_type(annotation, kind):
    assert scalar_type(annotation) is kind


@pytest.mark.parametrize(
    ("kind", "given", "value"),
    [
        (int, "7", 7),
        (int, 7.0, 7),
        (int, "7.0", 7),
        (int, np.int64(7), 7),
        (float, "5e-5", 5e-5),
        (float, 3, 3),
        (float, np.float32(0.5), 0.5),
        (float, None, None),
        (bool, "no", False),
        (bool, 1, True),
        (bool, np.bool_(True), True),
    ],
)
def test_scalar(kind, given, value):
    found = as_scalar("x", kind, given)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        (int, 1.5, "a whole number"),
        (int, "x", "a whole number"),
        (int, float("inf"), "a whole number"),
        (float, "fast", "a number"),
        (float, [1.0], "a number"),
        (bool, "maybe", "True or False"),
        (bool, 2, "True or False"),
    ],
)
def test_scalar_error(kind, given, expected):
    with pytest.raises(ValueError) as error:
        as_scalar("some_field", kind, given)
    assert str(error.value) == f"some_field: expected {expected}, got {given!r}."


def test_numbers_in_text_as_yaml_gives_them():
    args = TrainingArguments(
        learning_rate="5e-5", seed="3", fp16="false", tf32="no", max_steps=10.0
    )
    assert (args.learning_rate, args.seed, args.fp16, args.tf32) == (5e-5, 3, False, False)
    assert type(args.max_steps) is int
