"""How values get into a DeepSpeed configuration, and what is told of those that disagree."""

from collections.abc import Iterator
from typing import Any

AUTO = "auto"

_ADAMS = ("adam", "adamw")


def stage_of(config: dict[str, Any]) -> int:
    """Return the ZeRO stage of a configuration that ``raw_config`` returned."""
    return int(config["zero_optimization"]["stage"])


def value_at(config: dict[str, Any], path: str, default: Any = None) -> Any:
    """Return the value under a path such as ``zero_optimization.stage``."""
    node: Any = config
    for part in path.split("."):
        if not isinstance(node, dict) or part not in node:
            return default
        node = node[part]
    return node


class Filling:
    """Fills a configuration in place, and collects what disagrees."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self._wrong: list[str] = []

    def put(
        self, path: str, value: Any, name: str, *, add: bool = False, check: bool = True
    ) -> None:
        """Put a value where ``"auto"`` is; with ``add``, also where nothing is; else compare."""
        parent, _, key = path.rpartition(".")
        node = value_at(self.config, parent) if parent else self.config
        if not isinstance(node, dict):
            return
        given = node.get(key)
        if given == AUTO or (given is None and add):
            node[key] = value
        elif given is not None and check and given != value:
            self._wrong.append(f"{path}={given!r} in the configuration, {name}={value!r}")

    def raise_if_wrong(self) -> None:
        """Raise ValueError listing all that disagreed."""
        if self._wrong:
            raise ValueError(
                "deepspeed: values disagree with the arguments:\n  "
                + "\n  ".join(self._wrong)
                + '\nSet these values of the configuration to "auto", which takes those of the arguments.'
            )


def fill_optimizer(args: Any, filling: Filling) -> None:
    """Fill in what DeepSpeed's optimizer takes."""
    section = filling.config.get("optimizer")
    if not isinstance(section, dict):
        return
    section.setdefault("params", {})
    adam = str(section.get("type", "")).lower() in _ADAMS
    put, params = filling.put, "optimizer.params"
    put(f"{params}.lr", args.learning_rate, "learning_rate", add=True)
    betas = [args.adam_beta1, args.adam_beta2]
    if isinstance(section["params"].get("betas"), tuple):
        section["params"]["betas"] = list(section["params"]["betas"])
    put(f"{params}.betas", betas, "[adam_beta1, adam_beta2]", add=adam)
    put(f"{params}.eps", args.adam_epsilon, "adam_epsilon", add=adam)
    put(f"{params}.weight_decay", args.weight_decay, "weight_decay", add=adam)


def fill_buckets(filling: Filling, model: Any) -> None:
    """Fill in the sizes that depend on the width of the model.

    Those are a square of weights to reduce at a time, and with stage 3 0.9 of one to fetch ahead;
    parameters of less than ten rows stay whole.
    """
    sizes: dict[str, Any] = {"reduce_bucket_size": lambda width: width * width}
    if stage_of(filling.config) == 3:
        sizes["stage3_prefetch_bucket_size"] = lambda width: int(0.9 * width * width)
        sizes["stage3_param_persistence_threshold"] = lambda width: 10 * width
    zero = filling.config["zero_optimization"]
    open_ones = [name for name in sizes if zero.get(name) == AUTO]
    if not open_ones:
        return
    width = _hidden_size(model)
    if width is None:
        names = ", ".join(f"zero_optimization.{name}" for name in open_ones)
        raise ValueError(
            f'deepspeed: {names} cannot be "auto", because {type(model).__name__} has no config with '
            "hidden_size or hidden_sizes to compute them from; give numbers."
        )
    for name in open_ones:
        zero[name] = sizes[name](width)


def _hidden_size(model: Any) -> int | None:
    """Return the width of a library's model, the largest if there are several."""
    config = getattr(model, "config", None)
    for source in (config, getattr(config, "text_config", None)):
        if getattr(source, "hidden_size", None) is not None:
            return int(source.hidden_size)  # type: ignore[union-attr]
        if getattr(source, "hidden_sizes", None):
            return int(max(source.hidden_sizes))  # type: ignore[union-attr]
    return None


def autos(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the paths under which ``"auto"`` is left."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from autos(value, f"{prefix}{key}.")
        elif value == AUTO:
            yield prefix + key
