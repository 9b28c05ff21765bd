"""Settings of every test: one thread, so that times are comparable, and no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Forget what was compiled, before a test and after it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
