"""The optimiser and its schedule: who learns at which rate, what decays, and the rate at each step."""

import torch
from networks import Network
from recipes import Segmentation, Training


def make_optimizer(network: Network, settings: Training | Segmentation) -> torch.optim.Optimizer:
    """SGD or AdamW with one group for the weights and one for the biases of each part of the network.

    A group holds, besides what torch reads, its ``name`` ("head biases") and its ``multiplier`` of the rate; parameters
    that are not trained are in no group. SGD is torch's, which keeps the rate out of the momentum: after the rate
    falls, Caffe's still moves at the old one for a few steps.

    Args:
        network: its `parts` name the settings: "head" learns at ``settings.lr * settings.head_lr``.
        settings: of the stage.
    """
    groups = []
    for part, module in network.parts().items():
        trained = [(name.endswith("bias"), p) for name, p in module.named_parameters() if p.requires_grad]
        for are_biases, multiplier in zip((False, True), getattr(settings, f"{part}_lr"), strict=True):
            parameters = [parameter for is_bias, parameter in trained if is_bias == are_biases]
            if parameters:
                decays = settings.decay_biases or not are_biases
                groups.append(
                    {
                        "params": parameters,
                        "name": f"{part} {'biases' if are_biases else 'weights'}",
                        "multiplier": multiplier,
                        "lr": settings.lr * multiplier,
                        "weight_decay": settings.weight_decay if decays else 0.0,
                    }
                )
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, settings.lr, momentum=settings.momentum, nesterov=settings.nesterov)
    return torch.optim.AdamW(groups, settings.lr)


def rate(settings: Training | Segmentation, step: int) -> float:
    """The base rate of an optimiser step, counted from 0.

    Attention networks: divided by 10 from ``drop_at`` on (paper, section 4.1). Segmentation: the poly schedule of
    DeepLab, ``lr * (1 - step / iterations) ** power``.
    """
    if not 0 <= step < settings.iterations:
        raise ValueError(f"expected a step from 0 to {settings.iterations - 1}, got {step}")
    if isinstance(settings, Segmentation):
        return settings.lr * (1 - step / settings.iterations) ** settings.power
    return settings.lr / 10 if step >= settings.drop_at else settings.lr


def set_rate(optimizer: torch.optim.Optimizer, settings: Training | Segmentation, step: int) -> None:
    """Give each group of `make_optimizer` the rate of a step times its own multiplier."""
    base = rate(settings, step)
    for group in optimizer.param_groups:
        group["lr"] = base * group["multiplier"]
