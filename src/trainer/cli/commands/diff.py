"""``trainstep diff``: how two checkpoints differ, tensor by tensor."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.cli.result import DIFFERENT, SAME, Refusal, Result, columns, one_line

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.checkpoint import Loaded

SUMMARY = "how two checkpoints differ, tensor by tensor"
DESCRIPTION = """\
Compare two checkpoints bit by bit: for each tensor that differs the first and
the largest difference, how many numbers differ and by how many units in the
last place (ulp); then other parts of the state, the place in the data, and
arguments. Both checkpoints are verified on the way. DeepSpeed's are refused:
what they hold only DeepSpeed can read. Arguments that only say
where a run reports, such as output_dir, do not count."""
EPILOG = """\
exit status:
  0  nothing differs
  1  something differs
  2  a checkpoint is missing or damaged

examples:
  trainstep diff runs/a/checkpoint-100 runs/b/checkpoint-100
  trainstep diff runs/a/checkpoint-100 runs/b/checkpoint-100 --state
  trainstep diff runs/a/checkpoint-100 runs/b/checkpoint-100 --json"""

_POSITION = ("epoch", "batch", "in_epoch", "batch_size", "accumulation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("a", metavar="A", type=Path, help="folder of a checkpoint")
    parser.add_argument("b", metavar="B", type=Path, help="folder of another")
    parser.add_argument(
        "--state", action="store_true", help="compare the states only, not place and arguments"
    )


def run(options: argparse.Namespace) -> Result:
    """Compare the two."""
    from trainer.resuming import changed_arguments

    a, b = _load(options.a), _load(options.b)
    leaves = _leaf_differences(a, b)
    position: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    if not options.state:
        position = {
            key: [a.position.get(key), b.position.get(key)]
            for key in _POSITION
            if a.position.get(key) != b.position.get(key)
        }
        changed = changed_arguments(a.arguments, b.arguments)
        arguments = {name: list(pair) for name, pair in sorted(changed.items())}
    data = {
        "command": "diff",
        "a": str(options.a),
        "b": str(options.b),
        "same": not (leaves or position or arguments),
        "state_same": not leaves,
        "leaves": leaves,
        "position": position,
        "arguments": arguments,
    }
    return Result(SAME if data["same"] else DIFFERENT, data, _text(data))


def _load(path: Path) -> "Loaded":
    from trainer.checkpoint import CheckpointError, load
    from trainer.checkpoint.hf_format import is_foreign
    from trainer.checkpoint.layout import DEEPSPEED
    from trainer.cli.reading import checkpoint_at

    if is_foreign(checkpoint_at(path)):
        raise Refusal(
            f"{path}: the Hugging Face Trainer wrote it, so it holds no state of this package to compare. "
            "Resume it for one step, which saves one"
        )
    try:
        found = load(path)
    except CheckpointError as error:
        raise Refusal(one_line(error)) from None
    if DEEPSPEED in found.position:
        raise Refusal(
            f"{path}: its state is in DeepSpeed's own files, which only DeepSpeed can read. To compare "
            "weights, make model files of both with the zero_to_fp32.py in them"
        )
    if found.state is None:
        raise Refusal(f"{path}: it was saved with save_only_model, there is no state to compare")
    return found


def _leaf_differences(a: "Loaded", b: "Loaded") -> list[dict[str, Any]]:
    import trainstep as ts
    from trainstep import tree

    tensors = [dict(tree.leaves_with_paths(one.state)) for one in (a, b)]
    found = []
    for path, what, max_ulp in ts.diff(a.state, b.state):
        entry: dict[str, Any] = {"path": path, "what": what, **_NO_NUMBERS}
        if max_ulp is not None:
            entry |= _measure(tensors[0][path], tensors[1][path], max_ulp)
        found.append(entry)
    return found


_NO_NUMBERS: dict[str, Any] = dict.fromkeys(
    ("differing", "numel", "first", "largest", "max_abs", "max_ulp")
)


def _measure(a: "Tensor", b: "Tensor", max_ulp: int) -> dict[str, Any]:
    """Describe how two tensors of the same dtype and shape differ.

    Infinite and undefined differences are None, as JSON has no name for them.
    """
    import torch

    bits = [one.contiguous().reshape(-1, 1).view(torch.uint8) for one in (a, b)]
    differs = (bits[0] != bits[1]).any(dim=1)
    x, y = (_real(one).reshape(differs.numel(), -1).double() for one in (a, b))
    gap = torch.where(differs, (x - y).abs().amax(dim=1), -1.0)
    order = gap.nan_to_num(nan=math.inf, posinf=math.inf)
    first, largest = int(differs.nonzero()[0]), int(order.argmax())
    return {
        "differing": int(differs.sum()),
        "numel": differs.numel(),
        "first": _at(a, b, first),
        "largest": _at(a, b, largest),
        "max_abs": _finite(float(order[largest])),
        "max_ulp": max_ulp if max_ulp < torch.iinfo(torch.int64).max else None,
    }


def _real(tensor: "Tensor") -> "Tensor":
    import torch

    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _at(a: "Tensor", b: "Tensor", flat: int) -> dict[str, Any]:
    import torch

    place = torch.unravel_index(torch.tensor(flat), a.shape) if a.ndim else ()
    index = tuple(int(i) for i in place)
    return {"index": list(index), "a": _number(a[index]), "b": _number(b[index])}


def _number(value: "Tensor") -> Any:
    number = value.item()
    plain = isinstance(number, bool | int) or (isinstance(number, float) and math.isfinite(number))
    return number if plain else str(number)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _text(data: dict[str, Any]) -> list[str]:
    if data["same"]:
        return ["no difference"]
    lines = []
    if data["leaves"]:
        lines += [f"{len(data['leaves'])} parts of the state differ"]
        for leaf in data["leaves"]:
            lines += [f"  {leaf['path']}: {_what(leaf)}"]
    else:
        lines += ["the states are equal"]
    for title in ("position", "arguments"):
        if data[title]:
            pairs = [(name, f"{a!r} != {b!r}") for name, (a, b) in data[title].items()]
            lines += [title, *columns(pairs)]
    return lines


def _what(leaf: dict[str, Any]) -> str:
    if leaf["differing"] is None:
        return str(leaf["what"])
    ulp = "a NaN" if leaf["max_ulp"] is None else f"{leaf['max_ulp']:,} ulp"
    largest = "not finite" if leaf["max_abs"] is None else f"{leaf['max_abs']:.3g}"
    return (
        f"{leaf['differing']:,} of {leaf['numel']:,} differ, by {ulp} at most; "
        f"first {_place(leaf['first'])}; largest {_place(leaf['largest'])}, by {largest}"
    )


def _place(point: dict[str, Any]) -> str:
    values = [f"{v:.9g}" if isinstance(v, float) else str(v) for v in (point["a"], point["b"])]
    return f"at {tuple(point['index'])}: {values[0]} != {values[1]}"
