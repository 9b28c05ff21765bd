"""Stand-ins for optimizer libraries that may not be installed: modules of their documented shape."""

import sys
from types import ModuleType
from typing import Any

import accelerate  # noqa: F401  looks for libraries when it is imported: before there are stand-ins
import pytest
import torch
from torch import Tensor, nn


class Descent(torch.optim.Optimizer):
    """Momentum descent that takes any option; it stands for a library's class."""

    def __init__(self, params: Any, lr: float = 1e-3, **options: Any) -> None:
        super().__init__(params, {"lr": lr, **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    kept = self.state[parameter]
                    kept["step"] = kept.get("step", 0) + 1
                    velocity = kept.setdefault("velocity", torch.zeros_like(parameter))
                    velocity.mul_(0.9).add_(self.shaped(parameter.grad, kept, group))
                    parameter.sub_(group["lr"] * velocity)

    def shaped(self, grad: Tensor, kept: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return the direction of a gradient; ``kept`` is the parameter's state."""
        return grad


class GaLoreProjector:
    """Keeps a matrix that is made anew every ``update_proj_gap`` steps."""

    def __init__(self, rank: int, update_proj_gap: int) -> None:
        self.rank, self.gap, self.ortho_matrix = rank, update_proj_gap, torch.empty(0)


GaLoreProjector.__module__ = "galore_torch.galore_projector"


class LowRank(Descent):
    """Projects the gradients of groups with a rank, by an object in the state as GaLore's."""

    def __init__(self, params: Any, lr: float = 1e-3, **options: Any) -> None:
        super().__init__(params, lr, **options)
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                self.state[parameter]["seed"] = number  # as APOLLO does

    def shaped(self, grad: Tensor, kept: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if "rank" not in group:
            return grad
        made = GaLoreProjector(group["rank"], group["update_proj_gap"])
        projector = kept.setdefault("projector", made)
        if kept["step"] % projector.gap == 1 or not projector.ortho_matrix.numel():
            projector.ortho_matrix = torch.linalg.svd(grad).U[:, : projector.rank].contiguous()
        return projector.ortho_matrix @ (projector.ortho_matrix.T @ grad)


class Lomo(torch.optim.Optimizer):
    """Plain descent inside the backward pass, hooked into the model as lomo-optim does."""

    def __init__(self, model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        self.model, self.rates = model, []  # type: ignore[var-annotated]
        self.grad_func = self._make_hook()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self.grad_func)
        super().__init__(model.parameters(), {"lr": lr, "weight_decay": weight_decay})

    def _make_hook(self) -> Any:
        def update(grad: Any) -> Any:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    if parameter.requires_grad and parameter.grad is not None:
                        parameter.data.sub_(self.rates[-1] * parameter.grad)
                        parameter.grad = None
            return grad

        return update

    def fused_backward(self, loss: Tensor, lr: float) -> None:
        self.rates.append(lr)
        loss.backward()
        self.grad_func(0)


_CLASSES = {
    "apex.optimizers": {"FusedAdam": Descent},
    "apollo_torch": {"APOLLOAdamW": LowRank},
    "bitsandbytes.optim": dict.fromkeys(("AdEMAMix", "AdamW", "Lion", "RMSprop"), Descent),
    "galore_torch": dict.fromkeys(("GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreAdafactor"), LowRank),
    "grokadamw": {"GrokAdamW": Descent},
    "lomo_optim": dict.fromkeys(("AdaLomo", "Lomo"), Lomo),
    "optimi": {"StableAdamW": Descent},
    "schedulefree": dict.fromkeys(
        ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"), Descent
    ),
    "torch_npu.optim": {"NpuFusedAdamW": Descent},
    "torch_xla.amp.syncfree": {"AdamW": Descent},
    "torchao.optim": dict.fromkeys(("AdamW4bit", "AdamW8bit"), Descent),
    "torchdistx.optimizers": {"AnyPrecisionAdamW": Descent},
}
PACKAGES = tuple(name.partition(".")[0] for name in _CLASSES)


def pretend(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Put stand-ins for packages into ``sys.modules``, all if none is named."""
    for path, classes in _CLASSES.items():
        if names and path.partition(".")[0] not in names:
            continue
        found: dict[str, Any] = {
            cls: type(cls, (base,), {"__module__": path}) for cls, base in classes.items()
        }
        put(monkeypatch, path, **found)
    if not names or "galore_torch" in names:
        put(monkeypatch, "galore_torch.galore_projector", GaLoreProjector=GaLoreProjector)


def put(monkeypatch: pytest.MonkeyPatch, path: str, **attributes: Any) -> ModuleType:
    """Put a module with these attributes into ``sys.modules``, below stand-ins for its parents."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        parent = ".".join(parts[:end])
        if not isinstance(sys.modules.get(parent), _StandIn):
            monkeypatch.setitem(sys.modules, parent, _StandIn(parent))
    module = _StandIn(path)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, path, module)
    if len(parts) > 1:
        monkeypatch.setattr(sys.modules[".".join(parts[:-1])], parts[-1], module, raising=False)
    return module


def lack(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let imports of these packages fail, whether they are installed or not."""
    for path in [*sys.modules]:
        if path.partition(".")[0] in names:
            monkeypatch.delitem(sys.modules, path)
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


class _StandIn(ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
