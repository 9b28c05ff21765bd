"""What importing the packages brings in, and how the parts may import each other."""

import pytest

from support.processes import python

UNWANTED = (
    *("matplotlib", "transformers", "datasets", "pandas", "IPython", "psutil", "yaml", "sklearn"),
    *("wandb", "tensorboard", "tensorboardX", "mlflow", "comet_ml", "neptune", "clearml"),
    *("trackio", "swanlab", "dvclive", "codecarbon", "optuna", "ray", "huggingface_hub"),
)

LOADED = f"""
import sys
found = sorted(name for name in {UNWANTED} if name in sys.modules)
assert not found, found
"""

TRAINING = """
import tempfile, torch
from trainer import Trainer, TrainingArguments

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(2, 1)
    def forward(self, x, labels=None):
        out = self.head(x)
        return {"loss": (out[:, 0] - labels).square().mean(), "logits": out}

data = [{"x": torch.ones(2), "labels": torch.tensor(1.0)}] * 4
args = TrainingArguments(
    tempfile.mkdtemp(), use_cpu=True, max_steps=2, eval_strategy="steps", eval_steps=1,
    disable_tqdm=True, load_best_model_at_end=True, save_steps=1,
)
Trainer(Model(), args, train_dataset=data, eval_dataset=data).train()
"""


def test_importing_the_trainer_loads_next_to_nothing() -> None:
    python("import trainer" + LOADED + "assert 'torch' not in sys.modules")


def test_no_name_of_the_trainer_loads_an_optional_library() -> None:
    python("import trainer\nfor name in trainer.__all__: getattr(trainer, name)" + LOADED)


@pytest.mark.parametrize("module", ["trainstep", "trainer.cli"])
def test_neither_do_the_core_and_the_commands(module: str) -> None:
    python(f"import {module}" + LOADED)


def test_training_a_plain_module_loads_none_either() -> None:
    # The library that collects memory figures comes with accelerate, the hub's client with it.
    allowed = "for name in ('psutil', 'yaml', 'huggingface_hub'): sys.modules.pop(name, None)\n"
    python("import sys\n" + TRAINING + allowed + LOADED)


def test_the_core_never_loads_the_shell_or_its_libraries() -> None:
    python(
        "import pkgutil, sys, trainstep\n"
        "for module in pkgutil.iter_modules(trainstep.__path__): __import__('trainstep.' + module.name)\n"
        "found = {'trainer', 'accelerate', 'transformers'} & set(sys.modules)\n"
        "assert not found, found"
    )


def test_what_is_not_exported_is_an_attribute_error() -> None:
    import trainer

    assert "Trainer" in dir(trainer)
    with pytest.raises(AttributeError, match="module 'trainer' has no attribute 'Coach'"):
        trainer.Coach  # noqa: B018
