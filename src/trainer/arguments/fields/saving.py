"""Fields on checkpoints and on the Hub."""

# ruff: noqa: RUF009 (``option`` returns a ``dataclasses.field``)

from dataclasses import dataclass

from ..enums import HubStrategy, SaveStrategy
from .option import option


@dataclass(repr=False)
class SavingFields:
    """What is written and uploaded, how often, and how much of it is kept."""

    save_only_model: bool = option(
        False, "Leave optimizer, schedule and random states out of checkpoints: no exact resume."
    )
    save_strategy: SaveStrategy | str = option(
        "steps", "When checkpoints are written; best writes when the tracked metric improves."
    )
    save_steps: float = option(
        500, "Updates between two checkpoints; below 1 a fraction of all updates, rounded up."
    )
    save_on_each_node: bool = option(
        False, "Write on the first process of every node, not only on that of the first node."
    )
    save_total_limit: int | None = option(
        None, "Number of checkpoints kept. The newest and the best ones are never deleted."
    )
    enable_jit_checkpoint: bool = option(
        False,
        "On SIGTERM or SIGINT (Ctrl-C), end the step in progress, write a checkpoint and stop. "
        "A second signal stops at once.",
    )
    load_best_model_at_end: bool = option(
        False, "Load the best checkpoint when training ends. Evaluate and save at the same times."
    )
    restore_callback_states_from_checkpoint: bool = option(
        False, "When resuming, restore the callbacks that store a state in checkpoints."
    )
    resume_from_checkpoint: str | None = option(
        None, "For scripts: a folder to hand to train(). The Trainer does not read it."
    )
    push_to_hub: bool = option(
        False, "Upload at each save, as hub_strategy says. The Trainer of this version refuses it."
    )
    hub_token: str | None = option(
        None, "Access token for uploads. It is never written to a file or shown.", secret=True
    )
    hub_private_repo: bool | None = option(
        None, "Make a new repository private. None follows the default of the organisation."
    )
    hub_model_id: str | None = option(
        None, "Repository to upload to. None: the last part of output_dir, in the user's namespace."
    )
    hub_strategy: HubStrategy | str = option("every_save", "What is uploaded, and when.")
    hub_always_push: bool = option(
        False, "Upload even while the previous upload is running, instead of leaving this one out."
    )
    hub_revision: str | None = option(None, "Branch, tag or commit to upload to.")
