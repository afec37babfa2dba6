"""Observers of a layer: hooks, or a compiler or tracer that records its operations."""

import torch
from torch import nn


def is_watched(module: nn.Module) -> bool:
    """Whether a layer has hooks, or a parametrisation of its weights, which a shortcut around it would miss."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or hasattr(module, "parametrizations")


def is_recorded() -> bool:
    """Whether torch.compile, torch.export or a tracer is writing down the operations, and should see the plain ones."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
