"""Pre-activation and wide residual networks of arXiv 1807.08920, plain or with any view of the attention."""

from collections.abc import Sequence

import torch

from cmpe_se.networks.base import ResidualNetwork
from cmpe_se.networks.blocks import PreActBasic, PreActBottleneck


class PreActResNet(ResidualNetwork):
    """Pre-activation residual network for small images (arXiv 1603.05027), with the paper's attention by choice.

    Args:
        depth: 9n + 2 for bottleneck blocks (164 in the paper), 6n + 2 for basic ones (110).
        block: "bottleneck" or "basic".
        view: one of :data:`cmpe_se.VIEWS`, or None for the plain network.
        num_classes: outputs; 0 leaves the pooled features.
        in_chans: channels of the images.
        start, reduction, min_hidden, bias, mask: of the gates, see :class:`cmpe_se.CompetitiveSE`.
        static: names of blocks, such as ``stages.0.blocks.1``, whose gate is of the view ``static``.
        global_pool: pooling before the classifier, timm's names.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, growing linearly from 0 in the first block to this in the last.
        output_stride: 1 or 2 dilates the last stages instead of halving their maps; 4 and more change nothing.
        device, dtype: of the parameters.

    Raises:
        ValueError: a depth or block that does not exist, an unknown view.
    """

    def __init__(
        self,
        depth: int,
        *,
        block: str = "bottleneck",
        view: str | None = None,
        num_classes: int = 10,
        in_chans: int = 3,
        start: str = "half",
        reduction: int = 16,
        min_hidden: int = 1,
        bias: bool = False,
        mask: float = 0.0,
        static: Sequence[str] | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        output_stride: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        blocks = {"bottleneck": (PreActBottleneck, 9), "basic": (PreActBasic, 6)}
        if block not in blocks:
            raise ValueError(f"unknown block '{block}'; choose one of {', '.join(blocks)}")
        block_type, layers = blocks[block]
        self.depth, self.block, self.view = depth, block, view
        super().__init__(
            block_type,
            _blocks_per_stage(type(self).__name__, depth, layers, 2),
            1,
            stem_norm=False,
            view=view,
            # Only the bottleneck family's fold is the paper's own; basic blocks take the general rule.
            columns=lambda planes: 16 if block == "bottleneck" else None,
            maps=lambda planes, channels: max(1, planes // 16),
            start=start,
            reduction=reduction,
            min_hidden=min_hidden,
            bias=bias,
            mask=mask,
            static=static,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            head_drop_rate=drop_rate,
            block_drop_rate=0.0,
            drop_path_rate=drop_path_rate,
            output_stride=output_stride,
            device=device,
            dtype=dtype,
        )


class WideResNet(ResidualNetwork):
    """Wide residual network (arXiv 1605.07146), with the paper's attention by choice.

    Args:
        depth: 6n + 4 (28 in the paper).
        width: factor k on the planes 16, 32, 64 (10 in the paper). ``folded_3x3`` folds to 2k rows.
        view: one of :data:`cmpe_se.VIEWS`, or None for the plain network.
        num_classes: outputs; 0 leaves the pooled features.
        in_chans: channels of the images.
        start, reduction, min_hidden, bias, mask: of the gates, see :class:`cmpe_se.CompetitiveSE`.
        static: names of blocks, such as ``stages.0.blocks.1``, whose gate is of the view ``static``.
        global_pool: pooling before the classifier, timm's names.
        drop_rate: dropout between the two convolutions of each block.
        drop_path_rate: stochastic depth, growing linearly from 0 in the first block to this in the last.
        output_stride: 1 or 2 dilates the last stages instead of halving their maps; 4 and more change nothing.
        device, dtype: of the parameters.

    Raises:
        ValueError: a depth that does not exist, a width below 1, an unknown view.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        *,
        view: str | None = None,
        num_classes: int = 10,
        in_chans: int = 3,
        start: str = "half",
        reduction: int = 16,
        min_hidden: int = 1,
        bias: bool = False,
        mask: float = 0.0,
        static: Sequence[str] | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        output_stride: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"WideResNet: width must be a whole number of at least 1, got {width!r}")
        self.depth, self.width, self.view = depth, width, view
        super().__init__(
            PreActBasic,
            _blocks_per_stage(type(self).__name__, depth, 6, 4),
            width,
            stem_norm=True,
            view=view,
            # The paper's 2k rows; at width 1 they are too few for a 3x3 convolution, and the general rule holds.
            columns=lambda planes: planes if width > 1 else None,
            maps=lambda planes, channels: max(1, channels // 16),
            start=start,
            reduction=reduction,
            min_hidden=min_hidden,
            bias=bias,
            mask=mask,
            static=static,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            head_drop_rate=0.0,
            block_drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            output_stride=output_stride,
            device=device,
            dtype=dtype,
        )


def _blocks_per_stage(network: str, depth: int, layers: int, extra: int) -> int:
    """The n of depth = layers * n + extra, at least 1."""
    if not isinstance(depth, int):
        raise ValueError(f"{network}: depth must be a whole number, got {depth!r}")
    n, rest = divmod(depth - extra, layers)
    if rest or n < 1:
        smaller = layers * max(n, 1) + extra
        raise ValueError(
            f"{network}: depth must be {layers}n + {extra}, got {depth}; try {smaller} or {smaller + layers}"
        )
    return n
