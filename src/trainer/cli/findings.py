"""What ``replay`` and ``bisect`` say about the step at which two runs part."""

from collections.abc import Mapping
from typing import Any

from trainstep import Divergence

_SHOWN = 10
"""Leaves that the text lists; the rest is counted."""


def divergence_data(
    found: Divergence | None,
    parts: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {}),
    loss: tuple[float | None, float | None] = (None, None),
    names: tuple[str, str] = ("a", "b"),
) -> dict[str, Any]:
    """Return what is known of a difference, for JSON; the same keys if there is none.

    Args:
        found: where the runs part.
        parts: for both runs, the digest of each part of the state after that step, or nothing.
        loss: for both runs, the loss of that step.
        names: what the runs are called in ``loss``.
    """
    both = [name for name in parts[0] if name in parts[1]]
    return {
        "last_equal": found.last_equal if found else None,
        "first_different": found.step if found else None,
        "parts": [name for name in both if parts[0][name] != parts[1][name]],
        "leaves": [{"path": d.path, "what": d.what} for d in found.differences] if found else [],
        "loss": dict(zip(names, loss, strict=True)) if found else None,
    }


def divergence_text(data: dict[str, Any]) -> list[str]:
    """Return the lines that describe a difference."""
    step, equal = data["first_different"], data["last_equal"]
    since = "nothing before it was compared" if equal is None else f"step {equal} is equal"
    lines = [f"first difference: step {step}; {since}"]
    if equal is not None and step - equal > 1:
        lines.append(f"  it arose in one of the steps {equal + 1} to {step}")
    if data["parts"]:
        lines.append(f"  parts of the state that differ: {', '.join(data['parts'])}")
    if None not in data["loss"].values():
        pairs = [f"{name} {value!r}" for name, value in data["loss"].items()]
        lines.append(f"  loss of that step: {', '.join(pairs)}")
    leaves = data["leaves"]
    lines += [f"  {leaf['path']}: {leaf['what']}" for leaf in leaves[:_SHOWN]]
    if len(leaves) > _SHOWN:
        lines.append(f"  and {len(leaves) - _SHOWN} more")
    return lines
