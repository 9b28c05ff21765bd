"""``main``: reads the command line, runs a command, prints what it found."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from trainer.cli.commands import bisect, consolidate, diff, inspect, replay, report, verify
from trainer.cli.result import TROUBLE, Refusal, Result, one_line

_COMMANDS = (inspect, verify, diff, replay, bisect, report, consolidate)
_DESCRIPTION = """\
Look at checkpoints, verify and compare them, replay runs, find where two runs part,
put sharded models together, sum a run up."""
_EPILOG = """\
exit status:
  0  nothing found: undamaged, equal, reproduced
  1  something found: damaged, different, not reproduced
  2  it could not be done; standard error says why, on one line

examples:
  trainstep inspect runs/a/checkpoint-100
  trainstep verify runs/a
  trainstep bisect runs/a runs/b

`trainstep COMMAND --help` explains a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``trainstep``; return its exit status.

    Args:
        argv: the command line without the program's name; None takes that of the process.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        options = _parse(given)
        result = options.run(options)
        _show(result, options.json)
    except SystemExit as done:  # argparse has printed help or version
        return int(done.code or 0)
    except BrokenPipeError:  # whoever read the output has gone; Python must not try to flush it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return TROUBLE
    except (Refusal, OSError) as error:
        print(f"trainstep: {one_line(error)}", file=sys.stderr)
        return TROUBLE
    return int(result.status)


def _show(result: Result, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result.data, indent=2, allow_nan=False))
    else:
        print("\n".join(result.text))
    sys.stdout.flush()


class _Parser(argparse.ArgumentParser):
    """Says what is wrong on one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise Refusal(f"{message}; see {self.prog} --help")


class _Version(argparse.Action):
    """Looks the version up only if it is asked for: that may import torch."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"trainstep {_version()}")
        parser.exit()


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("trainstep")
    except PackageNotFoundError:  # run from a source tree
        import trainstep

        return trainstep.__version__


def _parse(argv: list[str]) -> argparse.Namespace:
    passed_on: list[str] = []
    if argv[:1] == ["replay"] and "--" in argv:
        split = argv.index("--")
        argv, passed_on = argv[:split], argv[split + 1 :]
    parser = _Parser(
        prog="trainstep",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        name = command.__name__.rpartition(".")[2]
        inner = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=command.DESCRIPTION,
            epilog=command.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(inner)
        inner.add_argument("--json", action="store_true", help="print JSON instead of text")
        inner.set_defaults(run=command.run)
    options = parser.parse_args(argv)
    options.script_arguments = passed_on
    return options
