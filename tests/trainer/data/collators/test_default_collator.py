"""The default collator against upstream's."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trainer.data.collators import DefaultDataCollator, default_data_collator

ROWS = {
    "int label": [{"label": i, "x": [i, 2]} for i in range(3)],
    "bool label": [{"label": i > 1, "x": 1.5} for i in range(3)],
    "float label": [{"label": i / 2, "x": [0.5]} for i in range(3)],
    "first label decides": [{"label": 1}, {"label": 2.0}],
    "tensor label": [{"label": torch.tensor(i), "x": torch.ones(2, 3) * i} for i in range(3)],
    "float tensor label": [{"label": torch.tensor(0.5)}, {"label": torch.tensor(1.5)}],
    "numpy label": [{"label": np.int64(i), "x": np.arange(4) + i} for i in range(3)],
    "array label": [{"label": np.array([i])} for i in range(3)],
    "label_ids": [{"label_ids": [i, 2], "x": (1, 2)} for i in range(3)],
    "float label_ids": [{"label_ids": [0.5, i]} for i in range(3)],
    "tensor label_ids": [{"label_ids": torch.tensor([i, 2], dtype=torch.int32)} for i in range(3)],
    "label before label_ids": [
        {"label": 1, "label_ids": [1, 2]},
        {"label": 0, "label_ids": [3, 4]},
    ],
    "None label": [{"label": None, "label_ids": [1, 2]}, {"label": None, "label_ids": [3, 4]}],
    "strings and Nones": [{"a": "text", "b": None, "c": [1]}, {"a": "more", "b": None, "c": [2]}],
    "extra key later": [{"x": 1}, {"x": 2, "y": 3}],
    "labels": [{"labels": 1}, {"labels": 0}],
    "mixed dtypes": [{"x": np.float32(1), "y": [True]}, {"x": np.float32(2), "y": [False]}],
    "objects": [SimpleNamespace(label=i, x=[i]) for i in range(3)],
}


@pytest.mark.row(56)
@pytest.mark.filterwarnings("ignore:Creating a tensor from a list:UserWarning")  # upstream does
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("kind", ["pt", "np"])
def test_equal_to_upstream(hf, assert_same, rows, kind):
    expected = hf.default_data_collator(rows, return_tensors=kind)
    assert_same(default_data_collator(rows, kind), expected)
    assert_same(DefaultDataCollator(return_tensors=kind)(rows), expected)
    assert_same(DefaultDataCollator()(rows, return_tensors=kind), expected)


def test_label_dtypes_without_a_peer():
    assert default_data_collator([{"label": 1}])["labels"].dtype == torch.int64
    assert default_data_collator([{"label": 1.0}])["labels"].dtype == torch.float32
    assert default_data_collator([{"label": 1}], "np")["labels"].dtype == np.int64
    assert default_data_collator([{"label": 1.0}], "np")["labels"].dtype == np.float32


@pytest.mark.parametrize("kind", ["pt", "np"])
def test_labels_in_arrays_without_axes(kind):
    """PyTorch does not take these from a list, so that upstream fails."""
    labels = default_data_collator([{"label": np.array(i)} for i in range(3)], kind)["labels"]
    assert str(labels.dtype).endswith("int64")
    assert labels.tolist() == [0, 1, 2]


def test_arrays_of_labels_are_stacked_without_the_slow_path_warning():
    rows = [{"label_ids": np.array([i, 2])} for i in range(2)]
    labels = default_data_collator(rows)["labels"]
    assert labels.dtype == torch.float32
    assert labels.tolist() == [[0, 2], [1, 2]]


def test_the_rows_are_left_as_they_are():
    rows = [{"label": 1, "x": [1]}, {"label": 0, "x": [2]}]
    default_data_collator(rows)
    assert rows == [{"label": 1, "x": [1]}, {"label": 0, "x": [2]}]


@pytest.mark.parametrize("kind", ["pt", "np"])
@pytest.mark.parametrize(
    ("short", "long"),
    [
        ([1, 2], [1, 2, 3]),
        (np.arange(2), np.arange(3)),
    ],
)
def test_unequal_shapes_name_the_key(kind, short, long):
    with pytest.raises(ValueError, match=r"default_data_collator: the values of 'x' do not stack"):
        default_data_collator([{"x": short}, {"x": long}], kind)


def test_unequal_tensors_show_their_shapes_and_the_remedy():
    rows = [{"x": torch.ones(2)}, {"x": torch.ones(3)}]
    with pytest.raises(ValueError, match=r"torch.Size\(\[2\]\), .*\[3\].*DataCollatorWithPadding"):
        default_data_collator(rows)


def test_a_missing_key_names_row_and_key():
    with pytest.raises(ValueError, match=r"row 1 lacks the key 'x'.*it has 'y'"):
        default_data_collator([{"x": 1}, {"y": 1}])


def test_rows_of_other_types_are_refused():
    with pytest.raises(TypeError, match=r"row 0 is a tuple; expected a mapping or an object"):
        default_data_collator([(1, 2)])
    with pytest.raises(TypeError, match=r"row 1 is a list; expected a mapping"):
        default_data_collator([{"x": 1}, [1]])


def test_bad_calls():
    with pytest.raises(ValueError, match=r"must be one of 'pt', 'np', got 'tf'"):
        default_data_collator([{"x": 1}], "tf")
    with pytest.raises(ValueError, match=r"the list of rows is empty"):
        DefaultDataCollator()([])
