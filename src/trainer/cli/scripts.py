"""Running a user's training script inside this process, as ``python script.py`` would."""

import os
import runpy
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from trainer.cli.result import Refusal, one_line
from trainer.replaying import Replay, ReplayDone, replaying


def run_script(script: Path, arguments: list[str], replay: Replay) -> None:
    """Run a script until its first training has been replayed.

    Args:
        script: the file; its folder is where it imports from.
        arguments: its command line.
        replay: what its Trainer is to do; holds the outcome afterwards.

    Raises:
        Refusal: if it fails, or does not train. Names the line of the script.
    """
    if not script.is_file():
        raise Refusal(f"{script}: no such script")
    ended = "it ended"
    try:
        with _as_main(script, arguments), redirect_stdout(sys.stderr), replaying(replay):
            runpy.run_path(str(script), run_name="__main__")
    except ReplayDone:
        return
    except SystemExit as error:
        ended = f"it exited with {error.code!r}"
    except Exception as error:
        if not replay.done:
            where = _line_of(script, error)
            raise Refusal(f"{where}: {type(error).__name__}: {one_line(error)}") from error
    if replay.done:  # in a thread of the script, say
        return
    raise Refusal(
        f"{script}: {ended} without a call of Trainer.train() of the package `trainer`; give the "
        "script's arguments behind --"
    )


@contextmanager
def _as_main(script: Path, arguments: list[str]) -> Iterator[None]:
    before = sys.argv, sys.path
    sys.argv = [str(script), *arguments]
    sys.path = [str(script.resolve().parent), *sys.path]
    try:
        yield
    finally:
        sys.argv, sys.path = before


def _line_of(script: Path, error: BaseException) -> str:
    """Return the innermost place in the script on the way to an exception."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if os.path.abspath(frame.filename) == _full(script)]
    return f"{script}:{lines[-1]}" if lines else str(script)


def _full(script: Path) -> str:
    return os.path.abspath(script)
