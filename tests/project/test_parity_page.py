"""The page of what works is made of the marked tests, and nothing works without one."""

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def parity() -> Any:
    spec = importlib.util.spec_from_file_location("generate_parity", DOCS / "generate_parity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(parity: Any) -> list[dict[str, Any]]:
    return [row for topic in parity.topics() for row in topic["rows"]]


def test_the_page_is_current(parity: Any) -> None:
    assert (DOCS / "parity.md").read_text() == parity.page(parity.topics(), parity.marked())


def test_rows_and_tests_agree(parity: Any, rows: list[dict[str, Any]]) -> None:
    assert parity.problems(rows, parity.marked()) == []


def test_every_row_of_the_reference_is_there_once(rows: list[dict[str, Any]]) -> None:
    assert [row["n"] for row in rows] == list(range(1, 214))
    assert all(row["feature"] and row["api"] for row in rows)


def test_rows_say_no_more_than_they_may(rows: list[dict[str, Any]]) -> None:
    keys = {"n", "feature", "api", "status", "why", "note"}
    assert [row for row in rows if set(row) - keys] == []


WORKS = {"n": 1, "status": "works"}


@pytest.mark.parametrize(
    ("rows", "tests", "message"),
    [
        ([WORKS], {}, "row 1 works, but no test is marked with it"),
        ([WORKS | {"status": "differs", "why": "x"}], {}, "row 1 differs, but no test is marked"),
        (
            [WORKS | {"status": "not yet", "why": "x"}],
            {1: [("a.py", "t")]},
            "row 1 is not yet, but a",
        ),
        ([WORKS | {"status": "not planned"}], {}, "row 1 is not planned, but does not say why"),
        ([WORKS | {"status": "maybe", "why": "x"}], {}, "status 'maybe' is none of works, differs"),
        ([WORKS], {1: [("a.py", "t")], 7: [("a.py", "t")]}, "row 7 is marked, but not in features"),
        ([WORKS, WORKS], {1: [("a.py", "t")]}, "a row is in features.toml twice"),
    ],
)
def test_contradictions_are_found(parity: Any, rows: Any, tests: Any, message: str) -> None:
    (found,) = parity.problems(rows, tests)
    assert message in found


MARKED = """
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.row(1)]

@pytest.mark.row(3, 2)
@pytest.mark.parametrize("x", [1])
def test_a(x): ...

def helper(): ...

@pytest.mark.row(4)
class TestGroup:
    pytestmark = pytest.mark.row(5)

    @pytest.mark.row(6)
    def test_b(self): ...
"""


def test_marks_of_modules_classes_and_functions_count(
    parity: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text(MARKED)
    (tmp_path / "tests" / "other.py").write_text(MARKED)
    monkeypatch.setattr(parity, "ROOT", tmp_path)
    a, b = ("tests/test_x.py", "test_a"), ("tests/test_x.py", "TestGroup::test_b")
    assert parity.marked() == {1: [a, b], 2: [a], 3: [a], 4: [b], 5: [b], 6: [b]}


def test_a_line_shows_three_tests_and_counts_the_others(parity: Any) -> None:
    row = {"n": 1, "feature": "F", "api": "`f`", "status": "differs", "why": "better"}
    tests = [("tests/a.py", f"test_{i}") for i in range(5)]
    assert parity._line(row, tests) == (
        "| 1 | F | `f` | works, differs: better | `tests/a.py::test_0`<br>`tests/a.py::test_1`<br>"
        "`tests/a.py::test_2`<br>+2 more |"
    )


def test_the_generator_needs_nothing_but_python(parity: Any) -> None:
    tree = ast.parse((DOCS / "generate_parity.py").read_text())
    imported = {
        name.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for name in node.names
    }
    assert imported == {"ast", "sys", "tomllib"}
