"""The training loop, on Accelerate, with timm's optimisers, schedules, mixup and moving average.

A run is a function of its settings. Every random draw of a step comes from (seed, step, process), and every batch from
(seed, epoch, batch), so a resumed run needs no generator's state and ends, on a CPU, with the same weights bit for bit.
"""

import copy
import math
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from cmpe_se.data import ImageData
from cmpe_se.errors import UserError
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.freezing import Backbone
from cmpe_se.training.interruption import Interruption, TrainingInterrupted
from cmpe_se.training.loss import balanced_class_weights, create_loss, loss_label
from cmpe_se.training.model_choice import BestEpoch
from cmpe_se.training.network import count_gates
from cmpe_se.training.optimisation import create_mixup, create_optimizer, ema_decay, learning_rate
from cmpe_se.training.parallel import is_sharded_run, shard, with_synchronised_norms
from cmpe_se.training.progress import TrainingProgress, only_warmup, opening
from cmpe_se.training.provenance import has_tf32, provenance
from cmpe_se.training.resizing import ProgressiveResizing
from cmpe_se.training.restoring import check_place, restore
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.training.seeding import seed_everything
from cmpe_se.training.sharing import load_checkpoint
from cmpe_se.training.step_sums import StepSums, TrainingMetrics, part_sums
from cmpe_se.training.summary import (
    UNTESTED,
    CheckpointTree,
    EpochRecord,
    EvaluationRecord,
    RunResult,
    ValidationRecord,
    summarise,
    test_record,
    validation_record,
)
from cmpe_se.training.tester import Tester, shard_of
from cmpe_se.training.watching import Watch
from cmpe_se.utils.cost import count_multiply_adds, count_parameters
from cmpe_se.utils.plots import plot_curves
from cmpe_se.utils.sharding import whole
from cmpe_se.utils.tensor_files import not_finite
from cmpe_se.utils.text import data_name, shortened

_STEPS_BETWEEN_LOOKS = 10  # at losses and, with several processes, at signals: a look waits for the device


class Trainer:
    """One run: what it needs, where it is, and the loop."""

    def __init__(
        self,
        config: TrainingConfig,
        data: ImageData,
        validation: ImageData | None,
        model: nn.Module,
        model_args: dict[str, Any],
        run: RunFolder,
        accelerator: Accelerator,
        interruption: Interruption,
    ):
        self.config, self.data, self.validation, self.run, self.model_args = config, data, validation, run, model_args
        self.accelerator, self.interruption = accelerator, interruption
        self.shard = shard_of(accelerator)
        self.steps_per_epoch = data.steps_per_epoch(config.batch_size)
        # Gradients are averaged over processes, whose shares may differ by an image: each image weighs the same.
        self.images_per_step = min(config.batch_size, data.train_size)
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        config.augmentation.only(data.augmentation_fields, f"the images of {data.name}")
        self.mixup = create_mixup(config, data, accelerator.num_processes)
        self.resizing = ProgressiveResizing(config.progressive_resizing or {}, data.train_image_size)

        self.params, self.macs = count_parameters(model), count_multiply_adds(model, (data.in_chans, *data.image_size))
        model = with_synchronised_norms(model, accelerator) if config.sync_batchnorm else model
        sharded = is_sharded_run(accelerator)  # FSDP2 takes contiguous weights alone
        self.network = model.to(accelerator.device).to(
            memory_format=torch.contiguous_format if sharded else self.layout
        )
        least = self.images_per_step // accelerator.num_processes
        if (sharded or config.sync_batchnorm) and least < config.accumulate:
            raise UserError(
                f"accumulate is {config.accumulate}, and a process has {least} image(s) of a batch: with parallel fsdp "
                "or sync_batchnorm processes wait for one another in each part; give a larger --batch-size, or a "
                "smaller --accumulate"
            )
        whole_copy = copy.deepcopy(self.network) if sharded else None
        self.backbone = Backbone(self.network, config.model) if config.freeze_epochs else None
        weights = balanced_class_weights(data).to(accelerator.device) if config.class_weights else None
        self.loss = create_loss(config, weights)
        average = partial(ModelEmaV3, decay=ema_decay(config), use_warmup=True, foreach=not sharded)
        self.ema = average(self.network) if config.ema else None
        self.optimizer, self.schedule = create_optimizer(config, self.network, self.steps_per_epoch)
        if config.compile:
            if config.progressive_resizing:  # a program for each size: beyond the limit it would not be compiled
                torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
            self.network.compile(dynamic=False if config.progressive_resizing else None)
        self.parallel, self.prepared_optimizer = accelerator.prepare(self.network, self.optimizer)
        if self.ema and sharded:
            shard(self.ema.module)
        self.tester = Tester(config, accelerator, self.network, self.averaged, whole_copy)

        self.epoch = self.batch = 0  # finished epochs, and finished batches of the one under way
        self.sums = StepSums(accelerator)
        self.epoch_seconds = 0.0
        self.history: list[EpochRecord] = []
        self.best = BestEpoch() if validation else None
        self.last_checkpoint: Path | None = None

    @property
    def step(self) -> int:
        """Finished steps of the run."""
        return self.epoch * self.steps_per_epoch + self.batch

    @property
    def averaged(self) -> nn.Module | None:
        """The network with the moving average of the weights."""
        return self.ema.module if self.ema else None

    @property
    def _rate(self) -> float:
        """Learning rate of the last step."""
        return learning_rate(self.optimizer)

    def fit(self) -> RunResult:
        """Train from the last checkpoint, or from the start, to the end."""
        main = self.accelerator.is_main_process
        self._restore()
        total = self.config.epochs * self.steps_per_epoch
        watched = (self.config, self.data, self.network, self.run, self.accelerator)
        with (
            TrainingProgress(self.config.epochs, total, enabled=main) as self.progress,
            Watch(*watched, self.progress.say, history=self.history, step=self.step, steps=total) as self.watch,
        ):
            if main:
                self.run.write_config(self.config)  # now that the settings are known to work
            self.progress.say(
                opening(
                    self.config,
                    self.data,
                    validation_images=self.validation.test_size if self.validation else 0,
                    view=getattr(self.network, "view", None),
                    params=self.params,
                    steps_per_epoch=self.steps_per_epoch,
                    device=self.accelerator.device,
                    run=self.run.path,
                )
            )
            if warning := only_warmup(self.config):
                self.progress.say(warning)
            for reason in self.run.checkpoints.unreadable:
                self.progress.say(f"damaged checkpoint passed over: {reason}")
            if self.last_checkpoint:
                self.progress.say(f"resuming after step {self.step} of {total}, from {self.last_checkpoint}")
                if self.step % self.steps_per_epoch and self.data.resume_note:
                    self.progress.say(self.data.resume_note)
            self.progress.start(self.step)
            if main and self.epoch < self.config.epochs:  # what was measured on these weights is void
                self.run.corruptions.unlink(missing_ok=True)
            while self.epoch < self.config.epochs and not self._has_waited_enough():
                record = self._train_epoch()
                if self._is_tested():
                    record = {**record, **(self._validate() if self.best else self._test())}
                self.history.append(record)
                self.watch.measure_gates()
                self._save_checkpoint()
                if main:
                    self.run.write_metrics(self.history)
                self.progress.end_epoch(record)
                self.watch.end_epoch()
            return self._finish()

    def _train_epoch(self) -> EpochRecord:
        """The rest of the epoch under way, untested; afterwards ``epoch`` counts it and ``batch`` is 0."""
        self.parallel.train()
        if self.backbone:
            self.backbone.freeze(self.epoch < self.config.freeze_epochs)
        started, self._seconds_before = time.perf_counter(), self.epoch_seconds
        batches = self.data.train_batches(
            self.epoch,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            augmentation=self.config.augmentation,
            start=self.batch,
            **self.shard,
        )
        try:
            for images, labels in batches:
                self.watch.before_step(images, last=self.batch + 1 == self.steps_per_epoch)
                self._train_step(images, labels)
                self.watch.after_step()
                self.batch += 1
                self.epoch_seconds = self._seconds_before + time.perf_counter() - started
                looked = self.step % _STEPS_BETWEEN_LOOKS == 0
                if looked:
                    self._look()
                if self.interruption.agreed(self.accelerator, now=looked):
                    self._save_checkpoint()
                    raise TrainingInterrupted(self.run.path, self.step)
                if self.step % self.config.checkpoint_steps == 0 and self.batch < self.steps_per_epoch:
                    self._save_checkpoint()
        finally:
            del batches  # ends its workers; in the frames of an exception they would be waited for, five seconds each
        self._look()
        self.epoch_seconds = self._seconds_before + time.perf_counter() - started
        record: EpochRecord = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "lr": self._rate,
            **self._metrics(),
            "seconds": self.epoch_seconds,
            **UNTESTED,
        }
        self.epoch, self.batch, self.epoch_seconds = self.epoch + 1, 0, 0.0
        self.sums.reset()
        return record

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        """One step of the optimiser on this process's share (B, C, H, W) and (B,) of a batch."""
        seed_everything(self.config.seed, self.step + 1, self.accelerator.process_index)
        self.schedule.step_update(self.step)
        targets, smoothing = labels, self.config.label_smoothing
        if self.mixup:
            (images, targets), smoothing = self.mixup(images, labels), 0.0  # targets (B, classes), smoothed already
        images = self.resizing(images, self.epoch).to(memory_format=self.layout)

        # As many parts on each process, which with FSDP2 wait for one another in each of them.
        count = min(self.config.accumulate, len(images))
        parts = list(zip(images.tensor_split(count), targets.tensor_split(count), strict=True))
        sums = torch.zeros(3, device=images.device)
        for number, (part, part_targets) in enumerate(parts, start=1):
            last = number == len(parts)
            with self.accelerator.no_sync(self.parallel) if not last else nullcontext():
                logits = self._forward(part)  # (B, classes)
                loss = self.loss(logits.float(), part_targets, label_smoothing=smoothing)
                self.accelerator.backward(loss * (len(part) * self.shard["world"] / self.images_per_step))
            sums += part_sums(logits.detach(), part_targets, loss.detach())
        self.sums.add(self.step + 1, self._rate, sums)
        self.watch.after_backward(self.step + 1)
        if self.config.clip_grad:
            self.accelerator.clip_grad_norm_(self.network.parameters(), self.config.clip_grad)
        self.prepared_optimizer.step()
        self.prepared_optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.network, step=self.step + 1)

    def _forward(self, images: Tensor) -> Tensor:
        try:
            # DDP's forward is in there already, FSDP2's is not.
            with self.accelerator.autocast() if is_sharded_run(self.accelerator) else nullcontext():
                return self.parallel(images)
        except ValueError as error:  # a norm that would see one value
            raise UserError(
                f"{self.config.model} cannot train on {len(images)} image(s) of {tuple(images.shape[1:])} at a time: "
                f"{error}; give a larger --batch-size, or a smaller --accumulate"
            ) from None

    def _look(self) -> None:
        """Add up the steps since the last look, and stop if a loss was not finite."""
        if not self.sums.unread:
            return
        if bad := self.sums.read():
            step, rate, loss = bad
            self._refuse(f"the loss is {loss}", step, rate)
        metrics = self._metrics()
        self.progress.update(
            self.epoch + 1, self.step, metrics["train_loss"], metrics["train_top1"], metrics["images_per_second"]
        )
        self.watch.looked(self.step, metrics)

    def _metrics(self) -> TrainingMetrics:
        return self.sums.metrics(self.epoch_seconds, accuracy=not self.mixup)

    def _refuse(self, what: str, step: int, rate: float) -> None:
        raise UserError(
            f"{what} at step {step} (epoch {-(-step // self.steps_per_epoch)}), learning rate {rate:.4g}; last good "
            f"checkpoint: {self.last_checkpoint or 'none yet'}; try a smaller --lr, --clip-grad 1 or --warmup-epochs 5"
        )

    def _is_tested(self) -> bool:
        return self.epoch % self.config.test_interval == 0 or self.epoch == self.config.epochs

    def _has_waited_enough(self) -> bool:
        """Whether patience is at its end."""
        return bool(self.best and self.config.patience and self.best.waited(self.epoch) >= self.config.patience)

    def _validate(self) -> ValidationRecord:
        """Metrics of the validation split, by which the best epoch is chosen."""
        assert self.validation is not None
        assert self.best is not None
        record = validation_record(self.tester.count(self.validation))
        self._check_loss("validation", record["validation_loss"])
        self.best.offer(self.epoch, record, self.tester.network)
        return record

    def _test(self) -> EvaluationRecord:
        """Metrics of the test images."""
        record = test_record(self.tester.count(self.data))
        self._check_loss("test", record["test_loss"])
        return record

    def _check_loss(self, part: str, loss: float) -> None:
        if not math.isfinite(loss):
            self._refuse(f"the {part} loss is {loss}", self.step, self._rate)

    def _save_checkpoint(self) -> None:
        """Write a checkpoint, a good one: every loss before it has been finite, and weights and statistics are."""
        self._look()
        network, averaged = (whole(one.state_dict()) if one else None for one in (self.network, self.averaged))
        for weights in filter(None, (network, averaged)):
            if name := not_finite(weights):
                self._refuse(f"some weights are not finite, of {name}", self.step, self._rate)
        optimizer = whole(self.optimizer.state_dict())
        if not self.accelerator.is_main_process:
            return
        self.run.checkpoints.save(
            {
                "network": network,
                "ema": averaged,
                "optimizer": optimizer,
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
                "epoch": self.epoch,
                "batch": self.batch,
                "batch_size": self.config.batch_size,
                "sums": self.sums.total,
                "epoch_seconds": self.epoch_seconds,
                "history": self.history,
                "best": self.best.state_dict() if self.best else None,
                "preprocessing": self.data.preprocessing.to_dict(),
            }
        )
        self.last_checkpoint = self.run.checkpoints.newest

    def _restore(self) -> None:
        loaded = load_checkpoint(self.accelerator, self.run.checkpoints)
        if loaded is None:
            return
        tree, self.last_checkpoint = cast(CheckpointTree, loaded[0]), loaded[1]
        check_place(tree, self.config.batch_size, self.steps_per_epoch, self.last_checkpoint)
        weights = [(self.network, tree["network"])]
        if self.averaged:
            weights.append((self.averaged, tree["ema"] or tree["network"]))
        restore(weights, self.optimizer, tree["optimizer"], self.last_checkpoint)
        if self.accelerator.scaler and tree["scaler"]:
            self.accelerator.scaler.load_state_dict(tree["scaler"])
        self.sums.total = tree["sums"]
        self.epoch, self.batch = tree["epoch"], tree["batch"]
        self.epoch_seconds, self.history = tree["epoch_seconds"], tree["history"]
        if self.best and (best := tree.get("best")):
            self.best.load_state_dict(best)

    def _finish(self) -> RunResult:
        """Write the network and its metrics."""
        if self.best:
            if self.epoch < self.config.epochs:
                self.progress.say(
                    f"stopped early, after epoch {self.epoch}: none since epoch {self.best.epoch} has a better "
                    "validation accuracy"
                )
            self.best.load_into(self.tester.network)
        kept = self.best.epoch - 1 if self.best else len(self.history) - 1
        # Not yet tested: a network that validation chose, and that of a run that is resumed to end where it stands.
        if (record := self.history[kept])["test_top1"] is None:
            record = self.history[kept] = {**record, **self._test()}
        metrics = summarise(
            self.config,
            self.data,
            self.history,
            view=getattr(self.network, "view", None),
            params=self.params,
            macs=self.macs,
            gates=count_gates(self.network),
            best_epoch=self.best.epoch if self.best else None,
        )
        result: RunResult = {
            **metrics,
            "processes": self.accelerator.num_processes,
            "run": str(self.run.path),
            "tf32": has_tf32(self.accelerator.device),
            **provenance(),
        }
        tested = self.tester.whole()
        if self.accelerator.is_main_process:
            self.run.write_metrics(self.history)  # a kill may have come between the last checkpoint and this
            tested = copy.deepcopy(tested).cpu().to(memory_format=torch.contiguous_format)
            self.run.save_model(tested, model_args=self.model_args, data=self.data)
            name = shortened(data_name(self.config.data, self.config.data_dir))
            title = f"{self.config.model} on {name}: top-1 {record['test_top1']:.2f} %"
            plot_curves(self.history, title, self.run.curves, loss=loss_label(self.config))
            self.run.write_result(result)
            self.watch.finish(record)
        self.accelerator.wait_for_everyone()
        return result
