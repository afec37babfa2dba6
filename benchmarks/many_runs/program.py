"""A network and its training step, on a GPU as one CUDA graph that is captured once and serves run after run."""

from collections.abc import Iterable
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmpe_se.data import SmallImages
from cmpe_se.errors import UserError
from cmpe_se.networks.blocks import Stage
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.optimisation import create_optimizer
from cmpe_se.training.seeding import seed_everything
from cmpe_se.training.step_sums import part_sums

_WARM_UP_STEPS = 3  # the libraries choose their kernels and take their memory before the capture
_KNOWN = """
model view convert start reduction min_hidden bias mask pretrained
data data_dir download image_size workers epochs batch_size seed
lr momentum weight_decay layer_decay gate_lr schedule min_lr warmup_epochs decay_milestones decay_epochs decay_rate
label_smoothing crop_padding flip cutout channels_last device checkpoint_steps test_interval
"""  # settings; the step here does what the others' defaults mean


def check_config(config: TrainingConfig) -> None:
    """Refuse settings that the step here does not know, also those that come to the trainer later.

    Raises:
        UserError: one of them is set.
    """
    for field in fields(config):
        name = field.name
        if name not in _KNOWN.split() and getattr(config, name) != field.default:
            raise UserError(
                f"many runs at a time train with {name} {field.default}, not {getattr(config, name)}; use "
                "`cmpe-se compare`"
            )


class Program:
    """Static memory of a run, and the step that works on it.

    A graph reads and writes fixed addresses, so a run's weights, its epoch's plan and its place in that plan are copied
    into this memory, and the graph knows nothing of which run it serves.

    Args:
        config: of the run; the seed does not matter.
        data: training images.
        network: made for ``config``, on the CPU.
        device: where to train; on a GPU, on the stream that is current when a method is called.
        fused: take PyTorch's fused SGD, which reads its learning rate from the device, as a graph's step has to. By
            default on a GPU only: elsewhere the trainer's own SGD is what gives its weights bit for bit.
    """

    def __init__(
        self,
        config: TrainingConfig,
        data: SmallImages,
        network: nn.Module,
        device: torch.device,
        *,
        fused: bool | None = None,
    ):
        check_config(config)
        self.config, self.data, self.device = config, data, device
        self.steps_per_epoch = data.steps_per_epoch(config.batch_size)
        self.on_gpu = device.type == "cuda"
        # Lanes stopped for good with channels last, and later in contiguous memory, too (results/LOG.md, "Runs side by
        # side"). The experiment's runs are of the latter, which stays until its plan is done.
        self.channels_last = config.channels_last and not self.on_gpu
        self.layout = torch.channels_last if self.channels_last else torch.contiguous_format
        self.network = network.to(device, memory_format=self.layout).train()
        self.optimizer, schedule = create_optimizer(config, self.network, self.steps_per_epoch)
        groups = self.optimizer.param_groups
        self.rates: list[list[float]] = []  # of each group, at each step of the run
        for step in range(config.epochs * self.steps_per_epoch):
            schedule.step_update(step)
            self.rates.append([group["lr"] for group in groups])
        self.scale = groups[0].get("lr_scale", 1.0)

        size = min(config.batch_size, data.train_size)
        self.plan = torch.zeros(self.steps_per_epoch, size, 6, dtype=torch.int64, device=device)
        self.row = torch.zeros(1, dtype=torch.int64, device=device)  # in the plan
        self.place = torch.zeros(1, dtype=torch.int64, device=device)  # in the whole run
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # images, losses, correct ones of the epoch
        self.finished_steps, self.seed = 0, config.seed
        self.graph: torch.cuda.CUDAGraph | None = None

        self.fused = self.on_gpu if fused is None else fused
        if self.fused:
            self.device_rates = torch.tensor(self.rates, device=device)  # (steps, groups)
            self.rate = torch.zeros(len(groups), device=device)
            for group, rate in zip(groups, self.rate.unbind(), strict=True):
                group.update(lr=rate, fused=True, foreach=False)
        self._reset_momentum()
        if self.on_gpu:
            self._staged = torch.zeros(self.plan.shape, dtype=torch.int64, pin_memory=True)
            self._copied = torch.cuda.Event(blocking=True)

    def capture(self, *, compile_blocks: bool = False) -> None:
        """Make the graph; what the weights were is lost.

        Args:
            compile_blocks: capture what torch.compile makes of each residual block.
        """
        blocks = [m for stage in self.network.modules() if isinstance(stage, Stage) for m in stage.blocks]
        if compile_blocks:
            for block in blocks:
                block.compile()
        stream = torch.cuda.current_stream()
        for _ in range(_WARM_UP_STEPS):
            self._step()
            self.row.zero_()  # a run may have fewer steps than this
            self.place.zero_()
        stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        # Other threads go on using the device meanwhile, which the default mode forbids.
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self._step()
        for block in blocks:
            block._compiled_call_impl = None  # tests run as they are: compiled, each would be compiled once more

    @torch.no_grad()
    def load(self, network: nn.Module, seed: int) -> None:
        """Begin a run from a network's weights."""
        for own, other in zip(_tensors(self.network), _tensors(network), strict=True):
            own.copy_(other)
        self._reset_momentum()
        self.place.zero_()
        self.finished_steps, self.seed = 0, seed
        self.network.train()

    def begin_epoch(self, plan: Tensor) -> None:
        """Take an epoch's plan (steps, B, 6)."""
        if self.on_gpu:
            self._copied.synchronize()  # the epoch before may not have fetched its own yet
            self._staged.copy_(plan)
            self.plan.copy_(self._staged, non_blocking=True)
            self._copied.record()
        else:
            self.plan.copy_(plan)
        self.row.zero_()
        self.sums.zero_()

    def step(self) -> None:
        """The next step of the run: on a GPU only enqueued.

        What a step draws (the masks of ``mask``) repeats with the seed without a graph only: graphs that run side by
        side share the device's generator.
        """
        if self.graph is not None:
            self.graph.replay()
        else:
            seed_everything(self.seed, self.finished_steps + 1, 0)  # as the trainer does
            self._step()
        self.finished_steps += 1

    @property
    def last_rate(self) -> float:
        """Learning rate of the last step, before a group's factor."""
        return self.rates[self.finished_steps - 1][0] / self.scale

    def _step(self) -> None:
        plan = self.plan.index_select(0, self.row)[0]  # (B, 6)
        images, labels = self.data.planned_batch(plan, self.config.augmentation)
        logits = self.network(images.to(memory_format=self.layout))  # (B, classes)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)
        loss.backward()
        self.sums += part_sums(logits.detach(), labels, loss.detach())
        self._set_rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.row += 1
        self.place += 1

    def _set_rate(self) -> None:
        if not self.fused:
            for group, rate in zip(self.optimizer.param_groups, self.rates[self.finished_steps], strict=True):
                group["lr"] = rate
            return
        self.rate.copy_(self.device_rates.index_select(0, self.place)[0])
        for parameter in self.network.parameters():
            # A side of one pixel or channel may have any stride, and the fused kernel insists on equal ones.
            if parameter.grad is not None and parameter.grad.stride() != parameter.stride():
                parameter.grad = _strided_as(parameter.grad, parameter)

    def _reset_momentum(self) -> None:
        """Zero: what SGD makes of its first step without a buffer is what a buffer of zeros gives."""
        if not self.fused:
            self.optimizer.state.clear()
            return
        for parameter in self.network.parameters():
            state = self.optimizer.state[parameter]
            if "momentum_buffer" in state:
                state["momentum_buffer"].zero_()
            else:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def _tensors(network: nn.Module) -> Iterable[Tensor]:
    return network.state_dict().values()


def _strided_as(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A gradient with the parameter's strides; a view, where only sides of length 1 differ."""
    sides = zip(gradient.shape, gradient.stride(), parameter.stride(), strict=True)
    if all(own == other for length, own, other in sides if length > 1):
        return gradient.as_strided(parameter.shape, parameter.stride())
    return torch.empty_like(parameter).copy_(gradient)
