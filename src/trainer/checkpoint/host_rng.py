"""The random state of this process's libraries, as JSON values.

Training itself draws nothing from it: its randomness is a function of seed and step. It is kept for
user code that draws from ``random``, ``numpy.random`` or torch's default generators.
"""

import base64
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def capture() -> dict[str, Any]:
    """Return the states of Python, NumPy (legacy), torch's CPU and, if in use, CUDA generators.

    Keys: ``python``, ``numpy``, ``torch``, ``cuda`` (a list with one entry a device). ``restore`` brings
    back exactly these, also after a way through JSON.
    """
    version, words, gauss = random.getstate()
    name, key, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    state: dict[str, Any] = {
        "python": [version, list(words), None if gauss is None else gauss.hex()],
        "numpy": [
            str(name),
            [int(word) for word in key],
            int(position),
            int(has_gauss),
            float(cached).hex(),
        ],
        "torch": _text(torch.get_rng_state()),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = [_text(one) for one in torch.cuda.get_rng_state_all()]
    return state


def restore(state: dict[str, Any]) -> None:
    """Put back what ``capture`` returned; generators that it does not name are left alone.

    States of CUDA devices that this process does not have are ignored.
    """
    if "python" in state:
        version, words, gauss = state["python"]
        cached = None if gauss is None else float.fromhex(gauss)
        random.setstate((version, tuple(words), cached))
    if "numpy" in state:
        name, key, position, has_gauss, gauss = state["numpy"]
        words = np.array(key, dtype=np.uint32)
        np.random.set_state((name, words, position, has_gauss, float.fromhex(gauss)))  # noqa: NPY002
    if "torch" in state:
        torch.set_rng_state(_tensor(state["torch"]))
    if torch.cuda.is_available():
        for index, text in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(_tensor(text), index)


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
