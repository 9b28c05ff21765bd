"""Write a Markdown page per public module from its docstrings: `python docs/generate.py`.

`python docs/generate.py --check` fails if a page on disk is not what would be written; a test runs it.
"""

import dataclasses
import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

PAGES = Path(__file__).parent / "api"

# Page -> the modules on it. Names that several modules export appear where they are defined.
MODULES = {
    "step": [
        "trainstep.making",
        "trainstep.step",
        "trainstep.initial",
        "trainstep.evaluate",
        "trainstep.batches",
        "trainstep.lowering",
    ],
    "state": ["trainstep.state", "trainstep.transfer", "trainstep.serialize", "trainstep.tree"],
    "model": [
        "trainstep.model",
        "trainstep.losses",
        "trainstep.chunked",
        "trainstep.grads",
        "trainstep.sums",
    ],
    "rng": ["trainstep.rng"],
    "optim": ["trainstep.optim"],
    "schedules": ["trainstep.schedules"],
    "transforms": ["trainstep.transforms"],
    "guards": ["trainstep.guards", "trainstep.scaling", "trainstep.spikes"],
    "compare": ["trainstep.compare", "trainstep.replay"],
    "parallel": ["trainstep.parallel", "trainstep.collectives"],
    "vmap": ["trainstep.vmap", "trainstep.per_sample", "trainstep.curvature"],
    "trainer": ["trainer.trainer", "trainer.seq2seq", "trainer.outputs", "trainer.interrupt"],
    "profiling": ["trainer.profiling", "trainer.figures"],
    "arguments": ["trainer.arguments"],
    "loop": ["trainer.loop", "trainer.plan"],
    "callbacks": ["trainer.callbacks"],
    "checkpoint": ["trainer.checkpoint"],
    "digests": ["trainer.digest_log"],
    "debug": ["trainer.debug"],
    "helpers": ["trainer.helpers", "trainer.optimizers.functions"],
    "data": [
        "trainer.data.order",
        "trainer.data.strategies",
        "trainer.data.grouped",
        "trainer.data.weighted",
        "trainer.data.sampler",
        "trainer.data.seeded",
        "trainer.data.seeding",
        "trainer.data.iterable",
        "trainer.data.feed",
        "trainer.data.prefetch",
    ],
    "collators": ["trainer.data.collators"],
}


def pages() -> dict[Path, str]:
    """Return what every page should hold."""
    index = ["# API\n", "Generated from docstrings by `python docs/generate.py`.\n"]
    result: dict[Path, str] = {}
    for page, names in MODULES.items():
        modules = [importlib.import_module(name) for name in names]
        result[PAGES / f"{page}.md"] = "\n".join(render(module) for module in modules)
        summary = (inspect.getdoc(modules[0]) or "").splitlines()[0]
        index.append(f"- [{page}]({page}.md): {summary}")
    result[PAGES / "README.md"] = "\n".join(index) + "\n"
    return result


def render(module: ModuleType) -> str:
    """Return a module's page: its docstring, then every public name with signature and docstring."""
    parts = [f"# `{module.__name__}`\n", f"{inspect.getdoc(module)}\n"]
    for name, value in public(module):
        parts.append(f"## `{name}`\n")
        if inspect.isclass(value) or callable(value):
            parts.append(f"```python\n{signature(name, value)}\n```\n")
        parts.append(f"```text\n{inspect.getdoc(value) or ''}\n```\n")
        if inspect.isclass(value):
            parts += helps(value, [cls for _, cls in public(module)])
            parts += [method(name, *pair) for pair in methods(value)]
    return "\n".join(parts)


def public(module: ModuleType) -> list[tuple[str, Any]]:
    """Return the public functions and classes that a module defines or, as a package, re-exports."""
    package = hasattr(module, "__path__")
    found = []
    for name, value in vars(module).items():
        home = getattr(value, "__module__", "")
        owned = home.startswith(module.__name__) if package else home == module.__name__
        if (
            not name.startswith("_")
            and owned
            and (inspect.isclass(value) or inspect.isroutine(value))
        ):
            found.append((name, value))
    return found


def helps(cls: type, shown: list[Any]) -> list[str]:
    """Return a list of a dataclass's fields with their help texts, but for those of bases on the page."""
    if not dataclasses.is_dataclass(cls):
        return []
    bases = [base for base in cls.__mro__[1:] if base in shown and dataclasses.is_dataclass(base)]
    above = {field.name for base in bases for field in dataclasses.fields(base)}
    lines = [
        f"- `{field.name}`: {field.metadata['help']}"
        for field in dataclasses.fields(cls)
        if "help" in field.metadata and field.name not in above
    ]
    return ["\n".join(lines) + "\n"] if lines else []


def methods(cls: type) -> list[tuple[str, Any]]:
    """Return the public methods that a class, or a part of the Trainer in it, defines."""
    parts = [cls, *(base for base in cls.__mro__ if base.__module__.startswith("trainer.facade."))]
    return [
        (name, value)
        for part in parts
        for name, value in vars(part).items()
        if not name.startswith("_") and inspect.isfunction(value) and inspect.getdoc(value)
    ]


def method(owner: str, name: str, value: Any) -> str:
    """Return a method's entry."""
    doc = inspect.getdoc(value)
    return (
        f"### `{owner}.{name}`\n\n```python\n{signature(name, value)}\n```\n\n```text\n{doc}\n```\n"
    )


def signature(name: str, value: Any) -> str:
    """Return a signature, one line or one parameter a line if it is long."""
    try:
        parameters = inspect.signature(value)
    except (TypeError, ValueError):
        return f"{name}(...)"
    line = f"{name}{parameters}".replace("typing.", "")
    if " at 0x" in line:  # the default is an object: its address would differ in every run
        line = f"{name}({', '.join(parameters.parameters)})"
    if len(line) <= 100:
        return line
    inner = ",\n".join(f"    {p}".replace("typing.", "") for p in parameters.parameters.values())
    if " at 0x" in inner:
        inner = ",\n".join(f"    {p}" for p in parameters.parameters)
    return f"{name}(\n{inner},\n)"


def main() -> int:
    """Write the pages, or check them."""
    stale = []
    for path, text in pages().items():
        current = path.read_text() if path.exists() else None
        if current != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                PAGES.mkdir(exist_ok=True)
                path.write_text(text)
    if stale and "--check" in sys.argv:
        print(f"out of date: {', '.join(stale)}; run `python docs/generate.py`")
        return 1
    print(f"{len(stale)} pages {'differ' if '--check' in sys.argv else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
