"""Who is measured: loops written by hand, pure steps and Trainers, on one process or several."""

from collections.abc import Callable, Mapping
from typing import Any

from attrs import field, frozen

FSDP = {"fsdp": "full_shard auto_wrap"}
LAYERS = {"transformer_layer_cls_to_wrap": ["Block"]}


@frozen
class Side:
    """A contender.

    Attributes:
        title: what tables call it.
        kind: "loop", "fsdp", "pure" or "trainer".
        base: the side on one GPU that its scaling is measured against; None for those themselves.
        rival: the hand-written side that its time is measured against.
        profiled: record a profile of some of its steps.
        options: of its kind.
    """

    title: str
    kind: str
    base: str | None = None
    rival: str | None = None
    profiled: bool = False
    options: Mapping[str, Any] = field(factory=dict)


_NO_SEARCH = {"ddp_find_unused_parameters": False}
_EXACT = {"full_determinism": True, **_NO_SEARCH}

SIDES = {
    "loop_one": Side("plain loop, 1 GPU", "loop"),
    "trainer_one": Side("our Trainer, 1 GPU", "trainer", options={"capture": "off"}),
    "ddp": Side("DDP by hand", "loop", "loop_one", "ddp", True),
    "trainer": Side("our Trainer, DDP", "trainer", "trainer_one", "ddp", True, options=_NO_SEARCH),
    "hf": Side(
        "HF Trainer, DDP", "trainer", "loop_one", "ddp", options={"library": "hf", **_NO_SEARCH}
    ),
    "fsdp": Side("FSDP2 by hand, autocast", "fsdp", "loop_one", "fsdp", True),
    "fsdp_plain": Side(
        "FSDP2 by hand, no autocast", "fsdp", "loop_one", "fsdp", options={"autocast": False}
    ),
    "trainer_fsdp": Side(
        "our Trainer, FSDP2",
        "trainer",
        "trainer_one",
        "fsdp",
        True,
        {**FSDP, "fsdp_config": LAYERS},
    ),
    "hf_fsdp": Side(
        "HF Trainer, FSDP2",
        "trainer",
        "loop_one",
        "fsdp",
        options={"library": "hf", **FSDP, "fsdp_config": {"version": 2, **LAYERS}},
    ),
    "pure": Side("data_parallel, donated", "pure", "loop_one", "ddp"),
    "captured": Side(
        "data_parallel, captured", "pure", "loop_one", "ddp", options={"captured": True}
    ),
    "exact": Side(
        "data_parallel(exact=True), donated", "pure", "loop_one", "ddp", options={"exact": True}
    ),
    "exact_captured": Side(
        "data_parallel(exact=True), captured",
        "pure",
        "loop_one",
        "ddp",
        options={"exact": True, "captured": True},
    ),
    "trainer_det": Side(
        "our Trainer, deterministic", "trainer", None, "trainer_det", options=_EXACT
    ),
    "trainer_exact": Side(
        "our Trainer, deterministic, exact_reduction",
        "trainer",
        None,
        "trainer_det",
        options={**_EXACT, "exact_reduction": True},
    ),
}


def run(side: Side, size: Any, device: str, make_gate: Callable[[], Callable[[], None]]) -> None:
    """Train as ``side`` does, for ever, calling the gate after every step.

    The gate, which may wait, is made when all is ready for the first step: others prepare meanwhile.
    """
    import gpu_sides
    from multi import loops, ranks

    options = dict(side.options)
    library = options.pop("library", "ours")
    ranks.place(device)
    if side.kind == "trainer":
        if device == "cpu":
            options["use_cpu"] = True
        gpu_sides.run_trainer(size, make_gate, 1, library, device, **options)
        return
    ranks.join(device)
    run_one = {"loop": loops.run_loop, "fsdp": loops.run_fsdp, "pure": loops.run_pure}[side.kind]
    run_one(size, device, make_gate, **options)
