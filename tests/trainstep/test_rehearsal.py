"""What counts as asking for the state of a generator."""

from types import SimpleNamespace
from typing import Any

import pytest

from trainstep.rehearsal import generators_watched


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("torch.utils.checkpoint", True),
        ("somebody.else", True),
        ("torch._dynamo.convert_frame", False),
        ("torch._inductor.compile_fx", False),
    ],
)
def test_the_compiler_may_ask_for_the_state_of_a_generator(name: str, counts: bool) -> None:
    module = SimpleNamespace(get_rng_state=lambda: 7)
    source = "def outer(module):\n    return inner(module)"
    space: dict[str, Any] = {"__name__": name, "inner": lambda module: module.get_rng_state()}
    exec(source, space)
    with generators_watched(module) as asked:
        assert space["outer"](module) == 7
        assert asked() == counts
    assert module.get_rng_state() == 7
