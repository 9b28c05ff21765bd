"""Labels by predicate, tensor, name, pattern and tree; selections in the same ways."""

import re
from typing import Any

import pytest
import torch

from trainstep import optim
from trainstep.optim.labels import check_used, labeller, selector

MATRIX, VECTOR = torch.zeros(2, 3), torch.zeros(2)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (lambda name: name[-1], {"enc.0.w": "w", "enc.1.w": "w", "head.b": "b"}),
        (lambda name, param: param.ndim, {"enc.0.w": 2, "enc.1.w": 2, "head.b": 1}),
        (lambda name, default="x": default, {"enc.0.w": "x", "enc.1.w": "x", "head.b": "x"}),
        ({r"\.w$": "w", "": "rest"}, {"enc.0.w": "w", "enc.1.w": "w", "head.b": "rest"}),
        ({"w": "some", "enc.1.w": "exact", "": "rest"}, {"enc.0.w": "some", "enc.1.w": "exact"}),
        ({"enc": {"0": "first", "1": {"w": "second"}}, "head": "top"},
         {"enc.0.w": "first", "enc.1.w": "second", "head.b": "top"}),
        ({"enc": "any", "enc.1": {"w": "longest"}, "head": {"b": "b"}},
         {"enc.0.w": "any", "enc.1.w": "longest", "head.b": "b"}),
        (re.compile("head").search, {"enc.0.w": None}),
        (str.upper, {"enc.0.w": "ENC.0.W"}),
    ],
)  # fmt: skip
def test_labels(labels: Any, expected: dict[str, Any]) -> None:
    label_of = labeller("partition", labels)
    params = {"enc.0.w": MATRIX, "enc.1.w": MATRIX, "head.b": VECTOR}
    assert {n: label_of(n, params[n]) for n in expected} == expected


@pytest.mark.parametrize(
    "where",
    [
        lambda name: name.startswith("enc"),
        lambda name, param: param.ndim == 2,
        "^enc",
        {"enc.w"},
        ["enc.w"],
        {"enc.w": True, ".*": False},
        {"enc": {"w": True}, "head": False},
        {"enc.w": None}.keys(),
    ],
)
def test_selections(where: Any) -> None:
    selected = selector("masked", where)
    assert selected("enc.w", MATRIX) is True
    assert selected("head.w", VECTOR) is False


def test_what_has_no_label_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"optim.masked: no pattern matches parameter b; patterns: a"
    ):
        labeller("masked", {"a": 1})("b", MATRIX)
    tree = {"enc": {"w": 1}}
    with pytest.raises(ValueError, match=r"no entry for parameter enc.b among w"):
        labeller("partition", tree)("enc.b", VECTOR)
    with pytest.raises(ValueError, match=r"no entry for parameter encoder.w among enc"):
        labeller("partition", tree)("encoder.w", VECTOR)
    with pytest.raises(TypeError, match="labels must be a function or a mapping, got 3"):
        labeller("partition", 3)  # type: ignore[arg-type]


NAMES = {"enc.0.w": MATRIX, "enc.1.w": MATRIX, "head.b": VECTOR}


@pytest.mark.parametrize(
    ("chosen", "unused"),
    [
        (r"^decoder", "'^decoder'"),
        (["enc.0.w", "enc.2.w", "head"], "'enc.2.w', 'head'"),
        ({"enc.1.b": 1, ".*": 2}, "'enc.1.b'"),
        ({"enc": {"0": 1, "2": {"w": 1}}, "head": 2}, "'enc.2', 'enc.2.w'"),
        ({"enc.0": 1, "encoder": {"w": 1}, "head": 2}, "'encoder', 'encoder.w'"),
    ],
)
def test_names_and_patterns_that_match_nothing_are_named(chosen: Any, unused: str) -> None:
    text = re.escape(f"no parameter matches {unused}; parameters: enc.0.w, enc.1.w, head.b")
    with pytest.raises(ValueError, match=text + "$"):
        check_used("masked", chosen, NAMES)


@pytest.mark.parametrize(
    "chosen",
    [
        lambda name: False,
        lambda name, param: False,
        "enc",
        [],
        {"head.b"},
        {"head.b": 1, "enc.0": 2, "bias": 3, r"norm\.": 4, "": 5},  # rules for several models
        {"enc": {"0": 1, "1": {"w": 1}}, "head": 2},
    ],
)
def test_what_is_used_or_may_be_unused_passes(chosen: Any) -> None:
    check_used("masked", chosen, NAMES)


def test_patterns_of_a_part_may_be_for_other_parts() -> None:
    many = {f"layer{i}.w": VECTOR for i in range(10)}
    with pytest.raises(ValueError, match=r"layer7\.w and 2 more$"):
        check_used("masked", "bias", many)
    first = optim.masked(optim.sgd(), "enc.0")
    by_depth = optim.layerwise_decay(first, 0.5, lambda name: int("head" in name))
    groups = optim.partition(
        {"head": "top", "enc": "rest"}, {"top": by_depth, "rest": optim.chain(optim.ema(first))}
    )
    assert set(groups.init(NAMES)["rest"]["0_ema(masked(sgd))"]["ema"]["average"]) == {
        "enc.0.w",
        "enc.1.w",
    }
    wrong = optim.partition(lambda name: "all", {"all": optim.masked(optim.sgd(), "decoder")})
    for _ in range(2):  # a failed init leaves nothing behind
        with pytest.raises(ValueError, match=r"optim\.masked: no parameter matches 'decoder'"):
            wrong.init(NAMES)
    with pytest.raises(ValueError, match=r"matches 'enc\.0'; parameters: x$"):
        first.init({"x": VECTOR})
