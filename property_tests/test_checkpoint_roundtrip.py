"""For any state: what is saved comes back, and any changed byte is noticed."""

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import trainstep as ts
from trainer.checkpoint import Contents, load, save, verify
from trainstep.state import TrainState

torch.set_num_threads(1)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.complex128)
NAMES = st.text(st.characters(exclude_characters="/", codec="utf-8"), max_size=6)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Draw random bits of a random dtype and shape, transposed or not."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = torch.Size(shape).numel()
    data = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if not count:
        return torch.zeros(shape, dtype=dtype)
    flat = torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
    return flat.mT if len(shape) > 1 and draw(st.booleans()) else flat


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | NAMES
TREES = st.recursive(
    tensors() | SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
STATES = st.builds(
    TrainState,
    step=st.integers(0, 2**60),
    params=st.dictionaries(NAMES, tensors(), max_size=3),
    buffers=st.dictionaries(NAMES, tensors(), max_size=3),
    opt_state=st.dictionaries(NAMES, TREES, max_size=3),
    key=st.builds(ts.rng.key, st.integers(0, 2**63 - 1)),
    extras=st.dictionaries(NAMES, TREES, max_size=3),
)


def contents(state: TrainState, in_model: bool) -> Contents:
    """Return contents whose model file holds the parameters, or something else."""
    weights = {"unrelated": torch.ones(2)}
    if in_model:
        storable = {n: p for n, p in state.params.items() if p.dtype != torch.complex128}
        weights |= {n: p.contiguous() for n, p in storable.items() if n != "__metadata__"}

    def write_model(folder: Path) -> None:
        save_file(weights, folder / "model.safetensors")

    return Contents(write_model, state, {"index": 1}, "{}", {}, {0: {"x": 1}})


@settings(deadline=None, max_examples=40)
@given(state=STATES, in_model=st.booleans())
def test_any_state_comes_back_with_the_same_bits(state: TrainState, in_model: bool) -> None:
    with tempfile.TemporaryDirectory() as root:
        path = save(root, 1, contents(state, in_model))
        assert verify(path) == []
        loaded = load(path).state
    assert loaded is not None
    assert ts.diff(loaded, state) == []
    assert ts.digest(loaded) == ts.digest(state)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_changed_byte_is_noticed(data: st.DataObject) -> None:
    state = TrainState(1, {"w": torch.ones(2)}, {}, {"m": torch.zeros(3)}, ts.rng.key(0))
    with tempfile.TemporaryDirectory() as root:
        path = save(root, 1, contents(state, in_model=True))
        file = data.draw(st.sampled_from(sorted(p for p in path.iterdir())))
        text = bytearray(file.read_bytes())
        place = data.draw(st.integers(0, len(text) - 1))
        text[place] = data.draw(st.integers(0, 255).filter(lambda value: value != text[place]))
        file.write_bytes(text)
        assert any(problem.startswith(f"{file.name}:") for problem in verify(path))
