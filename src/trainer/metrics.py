"""Numbers for people: speed, formatting, result files."""

import json
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Any


def speed_metrics(
    split: str,
    start_time: float,
    num_samples: float | None = None,
    num_steps: int | None = None,
    num_tokens: int | None = None,
) -> dict[str, float]:
    """Return ``<split>_runtime`` (seconds) and the samples, steps and tokens a second since ``start_time``.

    Rates are left out where the clock did not move.
    """
    runtime = time.time() - start_time
    result = {f"{split}_runtime": round(runtime, 4)}
    if runtime > 0:
        if num_samples is not None:
            result[f"{split}_samples_per_second"] = round(num_samples / runtime, 3)
        if num_steps is not None:
            result[f"{split}_steps_per_second"] = round(num_steps / runtime, 3)
        if num_tokens is not None:
            result[f"{split}_tokens_per_second"] = round(num_tokens / runtime, 3)
    return result


def with_prefix(metrics: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Put ``<prefix>_`` before every key that does not begin with it.

    Those come after the others, so that the loss is first: the order of the Hugging Face Trainer.
    """
    start = f"{prefix}_"
    named = {key: value for key, value in metrics.items() if key.startswith(start)}
    return named | {start + k: v for k, v in metrics.items() if not k.startswith(start)}


def missing_metric(name: str, metrics: Mapping[str, Any]) -> str:
    """Say what an evaluation gave instead of ``name``, and what was probably meant."""
    gave = f"the evaluation gave no {name}; it gave {', '.join(metrics)}."
    own, others = name.removeprefix("eval_"), [key.removeprefix("eval_") for key in metrics]
    if of_sets := [key for key in others if key.endswith(f"_{own}")]:
        return (
            f"{gave} With several evaluation sets, name one of their metrics: {_either(of_sets)}."
        )
    if close := get_close_matches(own, others):
        return f"{gave} Did you mean {_either(close)}? Otherwise let compute_metrics return it."
    return f"{gave} Let compute_metrics return it."


def _either(names: Iterable[str]) -> str:
    return " or ".join(f'"{name}"' for name in names)


def format_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Make values readable: memory in MB, runtimes as H:MM:SS, FLOPs in GF, floats to 4 places."""
    formatted: dict[str, Any] = {}
    for key, value in metrics.items():
        if "_mem_" in key:
            formatted[key] = f"{int(value) >> 20}MB"
        elif "_runtime" in key:
            whole, _, fraction = str(timedelta(seconds=float(value))).partition(".")
            formatted[key] = f"{whole}.{(fraction + '00')[:2]}"
        elif key == "total_flos":
            formatted[key] = f"{int(value) >> 30}GF"
        else:
            formatted[key] = round(value, 4) if isinstance(value, float) else value
    return formatted


def table(split: str, metrics: Mapping[str, Any]) -> str:
    """Lay values out as an aligned table with one sorted line each."""
    formatted = {key: str(value) for key, value in metrics.items()}
    left = max(map(len, formatted), default=0)
    right = max(map(len, formatted.values()), default=0)
    lines = [f"  {key: <{left}} = {formatted[key]:>{right}}" for key in sorted(formatted)]
    return "\n".join([f"***** {split} metrics *****", *lines])


def write_results(folder: Path, split: str, metrics: Mapping[str, Any], combined: bool) -> None:
    """Write ``<split>_results.json`` and, if asked, merge it into ``all_results.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / f"{split}_results.json", metrics)
    if combined:
        path = folder / "all_results.json"
        merged = json.loads(path.read_text()) if path.exists() else {}
        _write(path, {**merged, **metrics})


def _write(path: Path, metrics: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(metrics, indent=4, sort_keys=True))
