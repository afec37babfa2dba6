"""What the residual networks share: stem, stages, head, gates, and timm's model protocol."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.layers.hooks import is_symbolic
from cmpe_se.layers.static_twin import make_static
from cmpe_se.networks.blocks import PreActBlock, Stage

STEM_CHANNELS = 16
STAGE_PLANES = (16, 32, 64)


class Stem(nn.Module):
    """Batch norm without affine parameters on the image, a 3x3 convolution, and a batch norm in wide networks only."""

    def __init__(self, in_chans: int, *, norm: bool, **factory: Any):
        super().__init__()
        self.input_norm = nn.BatchNorm2d(in_chans, affine=False, **factory)
        self.conv = nn.Conv2d(in_chans, STEM_CHANNELS, 3, padding=1, bias=False, **factory)
        self.norm = nn.BatchNorm2d(STEM_CHANNELS, **factory) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, 16, H, W)."""
        return self.norm(self.conv(self.input_norm(x)))


class ResidualNetwork(nn.Module):
    """Stem, three stages with strides 1, 2 and 2, batch norm, ReLU, and a classifier: timm's model protocol.

    Use :class:`cmpe_se.PreActResNet` or :class:`cmpe_se.WideResNet`, which know the paper's proportions.

    Args:
        block: kind of all blocks.
        blocks_per_stage: n.
        width: factor on the planes 16, 32, 64.
        stem_norm: whether a batch norm follows the stem's convolution.
        view: of the gates; None for no gates.
        columns: of the planes of a stage, the columns of its gates' folded pictures; None for the general rule.
        maps: of the planes and the channels of a stage, the maps of its gates' convolutions.
        start, reduction, min_hidden, bias, mask: of the gates, see :class:`cmpe_se.CompetitiveSE`.
        static: names of blocks whose gate is of the view ``static``, whatever the others are.
        num_classes, in_chans, global_pool: outputs, channels of the images, pooling before the classifier.
        head_drop_rate, block_drop_rate, drop_path_rate: dropout before the classifier and within blocks, and stochastic
            depth.
        output_stride: most pixels of the image to one of the features, a power of two. Where a stage would exceed it,
            its convolutions are dilated instead, with the same weights. The networks end at 4.
        factory: device and dtype of the parameters.

    Raises:
        ValueError: channels, classes or a rate out of range; a block in ``static`` that is not there; what the gates
            refuse.
    """

    view: str | None

    def __init__(
        self,
        block: type[PreActBlock],
        blocks_per_stage: int,
        width: int,
        *,
        stem_norm: bool,
        view: str | None,
        columns: Callable[[int], int | None],
        maps: Callable[[int, int], int],
        start: str,
        reduction: int,
        min_hidden: int,
        bias: bool,
        mask: float,
        static: Sequence[str] | None,
        num_classes: int,
        in_chans: int,
        global_pool: str,
        head_drop_rate: float,
        block_drop_rate: float,
        drop_path_rate: float,
        output_stride: int,
        **factory: Any,
    ):
        super().__init__()
        if in_chans < 1 or num_classes < 0:
            raise ValueError(f"in_chans {in_chans} should be at least 1, and num_classes {num_classes} at least 0")
        for name, rate in (("drop_rate", head_drop_rate or block_drop_rate), ("drop_path_rate", drop_path_rate)):
            if not 0 <= rate < 1:
                raise ValueError(f"{name} is {rate}, should be at least 0 and below 1")
        if not isinstance(output_stride, int) or output_stride < 1 or output_stride & (output_stride - 1):
            raise ValueError(f"output_stride is {output_stride}, should be a power of two, such as 1, 2 or 4")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.stem = Stem(in_chans, norm=stem_norm, **factory)
        self.feature_info: list[dict[str, Any]] = [{"num_chs": STEM_CHANNELS, "reduction": 1, "module": "stem"}]

        gate: dict[str, Any] = {
            "view": view,
            "start": start,
            "reduction": reduction,
            "min_hidden": min_hidden,
            "bias": bias,
            "mask": mask,
        }

        def attention(planes: int, channels: int, **factory: Any) -> CompetitiveSE:
            return CompetitiveSE(channels, **gate, columns=columns(planes), maps=maps(planes, channels), **factory)

        channels, reduction, dilation = STEM_CHANNELS, 1, 1
        rates = calculate_drop_path_rates(drop_path_rate, blocks_per_stage * len(STAGE_PLANES))
        drop_paths = iter(cast(list[float], rates))
        self.stages = nn.Sequential()
        for index, planes in enumerate(STAGE_PLANES):
            stride, before = (2 if index > 0 else 1), dilation
            if reduction * stride > output_stride:
                stride, dilation = 1, dilation * stride
            reduction *= stride
            blocks = []
            for position in range(blocks_per_stage):
                blocks.append(
                    block(
                        channels,
                        planes * width,
                        stride=stride if position == 0 else 1,
                        dilations=(before if position == 0 else dilation, dilation),
                        drop_rate=block_drop_rate,
                        drop_path=next(drop_paths),
                        attention=partial(attention, planes) if view is not None else None,
                        **factory,
                    )
                )
                channels = planes * width * block.expansion
            self.stages.append(Stage(blocks))
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"stages.{index}"})

        self.num_features = self.head_hidden_size = channels
        self.norm: nn.Module = nn.BatchNorm2d(channels, **factory)
        self.head = ClassifierHead(channels, num_classes, global_pool, head_drop_rate, **factory)
        make_static(self, static or ())
        self.init_weights()

    def init_weights(self) -> None:
        """Draw every convolution from a normal distribution of variance 2 / (kernel area x output channels)."""
        gates = (module for module in self.modules() if isinstance(module, CompetitiveSE))
        foreign = [gate.map_gate for gate in gates if hasattr(gate, "map_gate")]  # as their authors draw
        own = {id(part) for gate in foreign for part in gate.modules()}
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and id(module) not in own:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W), of any size, to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) to normalised features (N, num_features, H/4, W/4)."""
        self._check_images(x)
        return self._activate(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits, or with ``pre_logits`` to pooled features (N, num_features)."""
        return self.head(x, pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of the stem (index 0) and the stages (1, 2, 3).

        Args:
            x: images (N, in_chans, H, W).
            indices: which to return; all if None, the last n if a number.
            norm: apply the final norm and ReLU to the last stage's features.
            stop_early: do not run the stages behind the last one asked for.
            output_fmt: "NCHW".
            intermediates_only: leave out the final features.

        Returns:
            Final features and the list of intermediate ones, or the list alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got '{output_fmt}'")
        self._check_images(x)
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        x = self.stem(x)
        intermediates = [x] if 0 in wanted else []
        final = len(self.stages)
        for index, stage in enumerate(self.stages[:last] if stop_early else self.stages, start=1):
            x = stage(x)
            if index in wanted:
                intermediates.append(self._activate(x) if norm and index == final else x)
        if intermediates_only:
            return intermediates
        return (x if stop_early and last < final else self._activate(x)), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> Sequence[int]:
        """Remove what the given intermediate features do not need; returns their indices as non-negative numbers."""
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        pruned = last < len(self.stages)
        self.stages = self.stages[:last]
        if pruned:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or pruned:
            self.norm = nn.Identity()
        if prune_head or pruned:
            self.reset_classifier(0, "")
        return wanted

    def get_classifier(self) -> nn.Module:
        """The classifier's linear layer (an identity where ``num_classes`` is 0)."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in place: ``num_classes`` = 0 for none, ``global_pool`` = "" for no pooling."""
        self.num_classes = num_classes
        pool = self.head.global_pool.pool_type if global_pool is None else global_pool
        like = self.stem.conv.weight
        new = ClassifierHead(
            self.num_features, num_classes, pool, self.head.drop.p, device=like.device, dtype=like.dtype
        )
        self.head = new.train(self.training)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for layer-wise learning rates."""
        stage = r"^stages\.(\d+)"
        return {
            "stem": r"^stem",
            "blocks": stage if coarse else [(stage + r"\.blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in cast(Iterable[Stage], self.stages):
            stage.grad_checkpointing = enable

    def _activate(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(x))

    def _check_images(self, x: Tensor) -> None:
        if is_symbolic(x):
            return
        if x.ndim != 4 or x.shape[1] != self.in_chans or 0 in x.shape:
            raise ValueError(
                f"{type(self).__name__} takes images of shape (N, {self.in_chans}, H, W) with N, H and W at least 1, "
                f"got {tuple(x.shape)}"
            )
