"""The README's Python runs, as one program from top to bottom."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_python_blocks_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    assert len(blocks) >= 2
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["a"].step == 101
    assert namespace["result"].global_step == 32


def test_commands_are_targets_of_the_makefile():
    makefile = (README.parent / "Makefile").read_text()
    commands = set(re.findall(r"make ([a-z-]+)", README.read_text()))
    assert {"train", "test"} <= commands
    for command in commands:
        assert re.search(rf"^{command}:", makefile, flags=re.M), command
