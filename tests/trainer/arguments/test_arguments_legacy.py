"""Names of version 4: refused, with advice."""

import dataclasses

import pytest

from trainer.arguments import HfArgumentParser, TrainingArguments
from trainer.arguments.legacy import REPLACED, advice


@pytest.mark.parametrize("name", REPLACED)
def test_former_name_is_a_type_error_with_advice(name):
    with pytest.raises(TypeError) as error:
        TrainingArguments("out", **{name: 1})
    expected = f"TrainingArguments() got an unexpected keyword argument {name!r}: {advice(name)}."
    assert str(error.value) == expected


def test_former_names_are_not_fields():
    assert not set(REPLACED) & {field.name for field in dataclasses.fields(TrainingArguments)}


def test_advice_names_existing_fields():
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    for text in REPLACED.values():
        if text.startswith("use ") and "environment" not in text:
            assert text.removeprefix("use ").split("=")[0] in fields


def test_other_unknown_name_is_a_type_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such_thing'"):
        TrainingArguments(no_such_thing=1)


def test_subclass_may_have_a_field_of_a_former_name():
    @dataclasses.dataclass
    class Mine(TrainingArguments):
        adafactor: bool = False

    assert Mine(adafactor=True).adafactor is True
    with pytest.raises(TypeError, match="use eval_strategy"):
        Mine(evaluation_strategy="steps")


def test_subclass_may_translate_former_names():
    class Mine(TrainingArguments):
        def __init__(self, **kwargs):
            super().__init__(eval_strategy=kwargs.pop("evaluation_strategy"), **kwargs)

    assert Mine(evaluation_strategy="epoch").eval_strategy == "epoch"


def test_parser_gives_the_advice_too():
    parser = HfArgumentParser(TrainingArguments)
    with pytest.raises(ValueError, match="evaluation_strategy: use eval_strategy"):
        parser.parse_args_into_dataclasses(["--evaluation-strategy=steps"])
    with pytest.raises(ValueError, match="no_cuda: use use_cpu"):
        parser.parse_dict({"no_cuda": True})
