"""Layers that somebody watches, which have to be called as they are."""

from torch import nn


def is_watched(module: nn.Module) -> bool:
    """Whether a layer has hooks, or a parametrisation of its weights, which a shortcut around it would miss."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or hasattr(module, "parametrizations")
