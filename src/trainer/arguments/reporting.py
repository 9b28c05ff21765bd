"""Names of trackers, and which of them are installed (without importing any)."""

import importlib.util
import os
from collections.abc import Sequence

TRACKERS: dict[str, tuple[str, ...]] = {
    "azure_ml": ("azureml.core",),
    "comet_ml": ("comet_ml",),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "tensorboard": ("tensorboard",),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
    "codecarbon": ("codecarbon",),
    "clearml": ("clearml",),
    "dagshub": ("dagshub", "mlflow"),
    "flyte": ("flytekit",),
    "dvclive": ("dvclive",),
    "swanlab": ("swanlab",),
    "kubeflow": (),
}
"""Names that ``report_to`` accepts, and the modules that each needs."""

KUBEFLOW_SERVER = "KUBEFLOW_TRAINER_SERVER_URL"
KUBEFLOW_DISABLED = "DISABLE_KUBEFLOW_INTEGRATION"


def available_trackers() -> list[str]:
    """Return what ``report_to="all"`` stands for: the trackers whose packages can be imported.

    ``flyte`` is only used on request, ``azure_ml`` only without ``mlflow`` (it logs through it), and
    ``kubeflow`` is a property of the environment, not of the packages.
    """
    found = [name for name in TRACKERS if name not in ("flyte", "kubeflow") and _installed(name)]
    if "mlflow" in found and "azure_ml" in found:
        found.remove("azure_ml")
    return found


def resolve_report_to(value: str | Sequence[str | None] | None) -> list[str]:
    """Turn ``report_to`` into a list of tracker names.

    ``None`` and ``"none"`` mean none, ``"all"`` every installed one. Inside a Kubeflow training job
    ``"kubeflow"`` is added.

    Raises:
        ValueError: A name is unknown.
    """
    names = [value] if value is None or isinstance(value, str) else list(value)
    names = [name for name in names if name not in (None, "none")]
    if "all" in names:
        names = [*available_trackers(), *(name for name in names if name != "all")]
    for name in names:
        if name not in TRACKERS:
            valid = ", ".join(map(repr, (*TRACKERS, "all", "none")))
            raise ValueError(f"report_to: {name!r} is not a tracker; choose among {valid}.")
    if _inside_kubeflow():
        names.append("kubeflow")
    return [name for name in dict.fromkeys(names) if name is not None]


def _installed(name: str) -> bool:
    if name == "tensorboard" and _importable("tensorboardX"):
        return True
    return all(_importable(module) for module in TRACKERS[name])


def _importable(module: str) -> bool:
    """Tell whether a module is there; a folder of its name (``./wandb``) is not a module."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return False
    return spec is not None and spec.origin is not None


def _inside_kubeflow() -> bool:
    disabled = os.environ.get(KUBEFLOW_DISABLED, "").strip().lower() in ("1", "true", "yes", "on")
    return bool(os.environ.get(KUBEFLOW_SERVER)) and not disabled
