"""LOMO and AdaLomo: a backward pass that updates each parameter and drops its gradient.

LOMO: Lv et al., 2023, arXiv 2306.09782. AdaLomo: Lv et al., 2023, arXiv 2310.10195.
"""

import logging

from trainer.optimizers.fused import refuse_scaling
from trainer.optimizers.request import Builder, Found, Request

logger = logging.getLogger(__name__)


def lomo(cls: str) -> Builder:
    """Return the builder of one of lomo-optim's classes, which are built over the model itself.

    Limits of the method: gradients are not clipped (``max_grad_norm`` has no effect), weight decay is
    the class's own default, there is no loss scale, and each micro-batch is an update of its own.
    AdaLomo needs a CUDA device, since the library puts its moments there.
    """

    def build(request: Request) -> Found:
        module = request.need("lomo_optim", "lomo-optim", "lomo")
        args, name = request.args, request.name
        refuse_scaling(args, f"optim={name!r}")
        if request.model is None:
            return getattr(module, cls), {}
        if args.gradient_accumulation_steps > 1:
            logger.warning(
                "optim=%r updates in every backward pass: gradients are not accumulated, each of the %d "
                "micro-batches makes an update with its share of the loss",
                name,
                args.gradient_accumulation_steps,
            )
        if args.weight_decay:
            logger.warning("optim=%r: weight_decay is not applied", name)
        return getattr(module, cls), {"model": request.model}

    return build
