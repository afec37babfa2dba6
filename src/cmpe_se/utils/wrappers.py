"""The network inside what training wraps it in."""

from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from cmpe_se.errors import UserError

_INSIDE: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.DataParallel, "module"),
    (DistributedDataParallel, "module"),
    (AveragedModel, "module"),
    (ModelEmaV2, "module"),
    (ModelEmaV3, "module"),
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, torch.compile, an average of weights and the like.

    Raises:
        UserError: no network.
    """
    while True:
        inner = next((getattr(model, name) for kind, name in _INSIDE if isinstance(model, kind)), None)
        if isinstance(model, ModelEma):
            inner = model.ema
        inner = inner or getattr(model, "_orig_mod", None)
        if inner is None:
            break
        model = inner
    if not isinstance(model, nn.Module):
        raise UserError(f"gates are in a network (torch.nn.Module), got {type(model).__name__}")
    return model
