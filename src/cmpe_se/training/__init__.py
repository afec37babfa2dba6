"""Training: from settings to a run folder."""

from typing import TYPE_CHECKING, Any

from cmpe_se.utils.packages import require_train

if TYPE_CHECKING:
    from cmpe_se.training.run import train

require_train("cmpe_se.training")

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    if name == "train":  # only then: most readers of a run folder never train
        from cmpe_se.training.run import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
