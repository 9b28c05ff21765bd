"""Fields on the length and the arithmetic of training."""

from dataclasses import dataclass

from .option import option


@dataclass(repr=False)
class TrainingFields:
    """Where to, how long, in which batches, from which seed."""

    output_dir: str | None = option(
        None,
        "Folder for checkpoints, final weights and results. Left out, it is "
        "'trainer_output'. A leading ~ is expanded.",
    )
    per_device_train_batch_size: int = option(
        8, "Rows that each device sees in one forward and backward pass of training."
    )
    num_train_epochs: float = option(
        3.0, "Passes over the training data. With a fraction, training stops part of the way."
    )
    max_steps: int = option(
        -1,
        "Number of optimizer updates. A positive value wins over num_train_epochs and repeats the "
        "data as needed; data without a length require it.",
    )
    gradient_accumulation_steps: int = option(
        1, "Micro-batches whose gradients are summed before each optimizer update."
    )
    label_smoothing_factor: float = option(
        0.0, "Epsilon of label smoothing; 0 means that labels are used as they are."
    )
    neftune_noise_alpha: float | None = option(
        None,
        "Strength of the uniform noise added to input embeddings while training (NEFTune). None "
        "adds no noise.",
    )
    seed: int = option(
        42, "Seed of Python, NumPy and torch, set when the Trainer is built and before model_init."
    )
    do_train: bool = option(False, "For scripts: whether to train. The Trainer does not read it.")
