"""``HfArgumentParser`` on dataclasses of users."""

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Optional

import pytest

from trainer.arguments import HfArg, HfArgumentParser, TrainingArguments


class Colour(Enum):
    RED = "red"
    THREE = 3


@dataclass
class Model:
    """Every kind of annotation."""

    name: str
    size: int = 2
    rate: float = 0.5
    folder: Path = Path("here")
    quick: bool = False
    careful: bool = True
    bare: bool = field(default=False, metadata={"help": "Help of bare."})
    maybe: Optional[bool] = None  # noqa: UP045
    limit: int | None = None
    colour: Colour = Colour.RED
    kind: Literal["a", 1, True] = "a"
    words: list[str] = field(default_factory=list)
    numbers: list[int] | None = None
    kinds: list[Literal["x", "y"]] = field(default_factory=lambda: ["x"])
    one_or_many: str | list[str] | None = None
    options: dict[str, Any] | None = None
    number_or_text: int | str = 1
    switch_or_text: str | bool = "no"
    text_or_false: str | Literal[False] | None = None
    anything: Any = None
    width: int = HfArg(default=3, help="Help of width.", aliases=["-w", "--broad"])
    hidden: int = field(default=5, init=False)
    level: str = field(default="low", metadata={"choices": ["low", "high"]})


def parse(*argv, types=Model, **options):
    options.setdefault("look_for_args_file", False)
    return HfArgumentParser(types).parse_args_into_dataclasses(list(argv), **options)


@pytest.mark.parametrize(
    ("argv", "changed"),
    [
        ("", {}),
        ("--size 3 --rate 1e-3 --folder /tmp", {"size": 3, "rate": 1e-3, "folder": Path("/tmp")}),
        ("--quick", {"quick": True}),
        ("--quick no --careful 0", {"careful": False}),
        ("--quick=YES", {"quick": True}),
        ("--no_careful", {"careful": False}),
        ("--no-careful", {"careful": False}),
        ("--maybe", {"maybe": True}),
        ("--maybe f", {"maybe": False}),
        ("--limit 4", {"limit": 4}),
        ("--colour red", {"colour": "red"}),
        ("--colour 3", {"colour": 3}),
        ("--kind 1", {"kind": 1}),
        ("--words a b", {"words": ["a", "b"]}),
        ("--numbers 1 2", {"numbers": [1, 2]}),
        ("--kinds y x", {"kinds": ["y", "x"]}),
        ("--one_or_many a", {"one_or_many": "a"}),
        ("--one-or-many a b", {"one_or_many": ["a", "b"]}),
        ('--options {"a":"1"}', {"options": {"a": 1}}),
        ("--number_or_text 5", {"number_or_text": 5}),
        ("--number_or_text five", {"number_or_text": "five"}),
        ("--switch_or_text", {"switch_or_text": True}),
        ("--switch_or_text padding", {"switch_or_text": "padding"}),
        ("--text_or_false False", {"text_or_false": False}),
        ("--text_or_false org/space", {"text_or_false": "org/space"}),
        ("--anything goes", {"anything": "goes"}),
        ("-w 4", {"width": 4}),
        ("--broad 4", {"width": 4}),
        ("--level high", {"level": "high"}),
        ("--siz 9", {"size": 9}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_argv(argv, changed):
    (found,) = parse("--name", "n", *argv.split())
    expected = Model("n")
    for key, value in changed.items():
        setattr(expected, key, value)
        assert type(getattr(found, key)) is type(value)
    assert found == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "the following arguments are required: --name"),
        ("--name n --size x", "--size: invalid int value: 'x'"),
        ("--name n --quick x", "expected yes/true/t/y/1 or no/false/f/n/0, got 'x'"),
        ("--name n --colour blue", "--colour: invalid choice: 'blue' (choose from"),
        ("--name n --kind b", "invalid choice: 'b' (choose from 'a', 1, True)"),
        ("--name n --kinds x z", "invalid choice: 'z'"),
        ("--name n --options [1]", "JSON object: expected a JSON object, got '[1]'"),
        ("--name n --level mid", "invalid choice: 'mid'"),
        ("--name n --hidden 3", None),
    ],
)
def test_bad_argv(argv, message, capsys):
    if message is None:
        with pytest.raises(ValueError, match=r"not used by the HfArgumentParser: \['--hidden'"):
            parse(*argv.split())
        return
    with pytest.raises(SystemExit):
        parse(*argv.split())
    assert message in capsys.readouterr().err


def test_help_shows_texts_and_defaults():
    text = HfArgumentParser(Model).format_help()
    assert "Help of bare. (default: False)" in text
    assert "Help of width. (default: 3)" in text


def test_bool_without_default_is_false_and_a_list_is_required(capsys):
    @dataclass
    class Plain:
        on: bool
        items: list[int]

    assert parse("--items", "1", types=Plain) == (Plain(False, [1]),)
    with pytest.raises(SystemExit):
        parse(types=Plain)
    assert "required: --items" in capsys.readouterr().err


def test_several_dataclasses_own_options_and_remaining_strings():
    @dataclass
    class Other:
        depth: int = 1
        _argument_group_name = "Depths"

    parser = HfArgumentParser([Model, Other], prog="prog", description="about")
    parser.add_argument("--extra", default=0, type=int)
    found = parser.parse_args_into_dataclasses(
        ["--name", "n", "--depth", "2", "--extra", "3", "--left", "over"],
        return_remaining_strings=True,
        look_for_args_file=False,
    )
    assert found == (Model("n"), Other(2), argparse.Namespace(extra=3), ["--left", "over"])
    assert "Depths:\n  --depth DEPTH" in parser.format_help()


def test_no_dataclass_gives_a_namespace():
    parser = HfArgumentParser()
    parser.add_argument("--extra")
    found = parser.parse_args_into_dataclasses(["--extra", "1"], look_for_args_file=False)
    assert found == (argparse.Namespace(extra="1"),)


def test_union_that_no_text_fits():
    @dataclass
    class Odd:
        pair: tuple[int, int] | set[int] = (1, 2)

    with pytest.raises(
        ValueError, match=r"Field 'pair': none of the types .*declare the field with"
    ):
        HfArgumentParser(Odd)


def test_annotation_that_cannot_be_resolved():
    @dataclass
    class Unknown:
        value: "NoSuchType" = None  # noqa: F821

    with pytest.raises(RuntimeError, match="Cannot read the annotations of Unknown: name 'NoSuch"):
        HfArgumentParser(Unknown)


def test_metadata_overrides_what_the_type_implies():
    @dataclass
    class Mine:
        items: list[int] = field(default_factory=list, metadata={"nargs": "*", "metavar": "N"})
        note: str = field(default="", metadata={"required": True, "unrelated": object()})

    assert parse("--items", "--note", "x", types=Mine) == (Mine([], "x"),)


# ---- files -------------------------------------------------------------------------------------


def test_args_files_and_their_precedence(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    (tmp_path / "script.args").write_text("--name beside --size 10\n--rate 0.1")
    (tmp_path / "one.args").write_text("--size 20 --words 'two words' \"b\"")
    (tmp_path / "two.args").write_text('--size 30 --options {"a":"1"}')
    monkeypatch.setattr(sys, "argv", [str(script), "--limit", "7"])
    parser = HfArgumentParser(Model)

    (found,) = parser.parse_args_into_dataclasses()
    assert (found.name, found.size, found.rate, found.limit) == ("beside", 10, 0.1, 7)

    flag = ["--file", str(tmp_path / "one.args"), "--file", str(tmp_path / "two.args")]
    (found,) = parser.parse_args_into_dataclasses(flag, args_file_flag="--file")
    assert (found.size, found.words, found.options) == (30, ["two words", "b"], {"a": 1})
    (found,) = parser.parse_args_into_dataclasses([*flag, "--size", "1"], args_file_flag="--file")
    assert found.size == 1

    (found,) = parser.parse_args_into_dataclasses(
        ["--name", "n"], args_filename=tmp_path / "one.args"
    )
    assert (found.name, found.size, found.rate) == ("n", 20, 0.5)
    (found,) = parser.parse_args_into_dataclasses(["--name", "n"], look_for_args_file=False)
    assert found.size == 2


def test_a_file_that_was_named_must_exist(tmp_path):
    missing = str(tmp_path / "missing.args")
    with pytest.raises(FileNotFoundError, match=r"missing\.args"):
        parse("--name", "n", args_filename=missing)
    with pytest.raises(FileNotFoundError, match=r"missing\.args"):
        parse("--name", "n", "--file", missing, args_file_flag="--file")


def test_dict_json_and_yaml(tmp_path):
    values = {"name": "n", "size": 4, "words": ["a"], "output_dir": "o", "eval_strategy": False}
    parser = HfArgumentParser((Model, TrainingArguments))
    expected = (Model("n", 4, words=["a"]), TrainingArguments("o"))
    assert parser.parse_dict(values) == expected
    path = tmp_path / "values.json"
    path.write_text(json.dumps(values))
    assert parser.parse_json_file(path) == parser.parse_json_file(str(path)) == expected
    pytest.importorskip("yaml")
    path.write_text("name: n\nsize: 4\nwords: [a]\noutput_dir: o\neval_strategy: no\n")
    assert parser.parse_yaml_file(path) == expected
    assert parser.parse_yaml_file(str(path), allow_extra_keys=True) == expected


def test_numbers_that_yaml_leaves_as_text(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "values.yaml"
    path.write_text("learning_rate: 5e-5\n")
    (args,) = HfArgumentParser(TrainingArguments).parse_yaml_file(path)
    assert args.learning_rate == 5e-5


def test_extra_keys(tmp_path):
    parser = HfArgumentParser(Model)
    values = {"name": "n", "zeta": 1, "alpha": 2}
    with pytest.raises(ValueError, match=r"not used by the HfArgumentParser: \['alpha', 'zeta'\]"):
        parser.parse_dict(values)
    assert parser.parse_dict(values, allow_extra_keys=True) == (Model("n"),)


def test_a_file_must_hold_names_and_values(tmp_path):
    path = tmp_path / "values.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match="expected names and values at the top level, got list"):
        HfArgumentParser(Model).parse_json_file(path)


def test_yaml_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match=r"pip install 'trainstep\[yaml\]'"):
        HfArgumentParser(Model).parse_yaml_file(tmp_path / "x.yaml")


# ---- the peer ----------------------------------------------------------------------------------


@dataclass
class Shared:
    """Annotations that the peer can parse too."""

    name: str = "n"
    size: int = 2
    rate: float = 0.5
    quick: bool = False
    careful: bool = True
    limit: int | None = None
    colour: Colour = Colour.RED
    kind: Literal["a", 1] = "a"
    words: list[str] = field(default_factory=list)
    numbers: list[int] | None = None
    number_or_text: int | str = 1


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "--size 3 --rate 1e-3 --name x",
        "--quick --no_careful",
        "--quick false --careful t",
        "--limit 4 --colour 3 --kind 1",
        "--words a b --numbers 1 2 --no-careful",
        "--number_or_text 7",
    ],
)
def test_results_are_those_of_the_peer(argv):
    theirs = pytest.importorskip("transformers").HfArgumentParser(Shared)
    expected = theirs.parse_args_into_dataclasses(argv.split(), look_for_args_file=False)
    assert parse(*argv.split(), types=Shared) == expected


def test_both_know_the_same_fields_of_a_subclass():
    @dataclass
    class Mine(TrainingArguments):
        extra: int = 1

    (args,) = parse("--extra", "2", "--seed", "3", types=Mine)
    assert (args.extra, args.seed) == (2, 3)
    assert dataclasses.fields(args)[-1].name == "extra"
