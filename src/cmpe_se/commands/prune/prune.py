"""The ``prune`` command: channels and blocks out of a finished run's network, and the training that repairs it."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from cmpe_se.commands.prune.controls import Controls
from cmpe_se.commands.prune.images import BATCH, batches_to_measure, load_images
from cmpe_se.commands.prune.latency import measure_latency
from cmpe_se.commands.prune.record import NAME, PruningRecord, begun, pruned_fields, sentences
from cmpe_se.commands.prune.starting import START, rebuilt, write_recipe, write_start
from cmpe_se.commands.train import train
from cmpe_se.data import ImageData
from cmpe_se.errors import UserError
from cmpe_se.pruning import prune as prune_network
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.metrics import collect_logits, test_metrics
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.devices import choose_device
from cmpe_se.utils.files import os_errors_as, whole_path, write_json
from cmpe_se.utils.packages import require
from cmpe_se.utils.progress import with_progress
from cmpe_se.utils.tables import number_table
from cmpe_se.utils.terminal import Terminal


def prune(
    run: str,
    *,
    target_macs: float = 0.7,
    criterion: str = "gate",
    layerwise: bool = False,
    steps: int = 1,
    round_to: int = 4,
    epochs: int = 10,
    lr: float | None = None,
    images: int = 2000,
    controls: bool = False,
    seeds: int = 3,
    data_dir: str | None = None,
    output: str | None = None,
) -> dict[str, Any]:
    """Take channels and blocks out of a finished run's network, and train it on.

    cmpe-se prune runs/digits --target-macs 0.7 --epochs 10

    The inner widths of the residual blocks go, by the gates also whole blocks, and channels of the residual stream
    where that cannot be enough. What is left is a run like any other: evaluate, predict, report, explore, export and
    push take it. The same command continues an interrupted one.

    Args:
        run: run folder of a residual network, with or without gates.
        target_macs: part of the multiply-adds to keep at most, between 0 and 1.
        criterion: what a channel is worth: gate (what it adds to the residual stream, by weights, norms and mean
            gates), taylor (change of the loss), l1 (of its filter), bn (scale of its batch norm) or random.
        layerwise: take the same part of each layer, instead of the least important channels wherever they are.
        steps: number of steps of equal multiply-adds; importances are measured anew before each.
        round_to: numbers of channels that stay are multiples of this, where any go.
        epochs: number of epochs of the training afterwards, at least 1.
        lr: highest learning rate of that training, a cosine; a tenth of the run's if left out.
        images: largest number of training images to measure importances with.
        controls: train what this has to be compared with too, for each seed: pruning by random and by l1, the
            whole network trained on, the same shape from scratch, and a thinner network from scratch.
        seeds: number of seeds of the controls, and of this network beside them.
        data_dir: folder of the run's data set, where it is somewhere else by now.
        output: run folder to make; RUN-pruned if left out.

    Returns:
        ``run`` (path of the new run), ``test_top1`` of it, and what pruning.json in its folder has: ``multiply_adds``,
        ``parameters`` and ``test_top1`` before and after each step, ``layers``, ``blocks``, ``latency`` and more; with
        ``controls`` also their rows, as compare.csv of the new run's controls has them.

    Raises:
        UserError: no finished run, a network without residual blocks, a target that cannot be reached, or its data set
            gone.
    """
    require(("torch_pruning",), "cmpe-se prune", extra="prune")
    if epochs < 1 or images < 1 or seeds < 1:
        raise UserError(f"epochs {epochs}, images {images} and seeds {seeds} should be at least 1")
    folder = RunFolder.open(run)
    folder.read_result()  # it is finished
    config = folder.read_config()
    if data_dir is not None:
        config = config.changed(data_dir=str(whole_path(data_dir)))
    target = RunFolder(whole_path(output) if output else folder.outputs.with_name(f"{folder.outputs.name}-pruned"))
    asked: dict[str, Any] = {"run": folder.lasting_name, "target_macs": target_macs, "criterion": criterion}
    asked |= {"layerwise": layerwise, "steps": steps, "round_to": round_to, "epochs": epochs, "images": images}
    asked |= {"lr": config.lr / 10 if lr is None else lr, "seed": config.seed}
    record = begun(target, asked)
    if record is None:
        RunFolder.new(target.path)
        record = _pruned(folder, config, target, asked, moved=data_dir is not None)
    _print(record)
    if target.config.exists():
        result = train(resume=target.path)
    else:
        start = target.path / START
        recipe = write_recipe(
            config, start / "recipe.yaml", record["widths"], pretrained=str(start), epochs=epochs, lr=asked["lr"]
        )
        result = train(recipe=recipe, output=target.path)
    record["trained_top1"] = top1 = result["test_top1"]
    with os_errors_as(f"cannot write to {target.path}"):
        write_json(target.path / NAME, record)
        target.write_result(cast(Any, {**target.read_result(), "pruning": _summary(record)}))
    Terminal().print(
        f"test top-1: {record['test_top1'][0]:.2f} % before, {record['test_top1'][-1]:.2f} % pruned, {top1:.2f} % "
        "after training on",
        highlight=False,
        soft_wrap=True,
    )
    found: dict[str, Any] = {**record, "run": str(target.path), "top1": record["test_top1"], "test_top1": top1}
    if controls:
        found["controls"] = Controls(folder, config, target, record, seeds).run()
    return found


def _summary(record: PruningRecord) -> dict[str, Any]:
    """What result.json says of the pruning."""
    return {
        "run": record["run"],
        "criterion": record["criterion"],
        "target_macs": record["target_macs"],
        "before": {
            "params": record["parameters"][0],
            "macs": record["multiply_adds"][0],
            "test_top1": record["test_top1"][0],
        },
        "after": {
            "params": record["parameters"][-1],
            "macs": record["multiply_adds"][-1],
        },
        "latency": record["latency"],
    }


def _pruned(
    folder: RunFolder, config: TrainingConfig, target: RunFolder, asked: dict[str, Any], *, moved: bool
) -> PruningRecord:
    """Prune, measure, and write the network to start from."""
    console = Terminal(stderr=True)
    model = folder.load_model()
    with console.status("loading images"):
        data = load_images(folder, config, moved=moved)
    device = choose_device(config.device)
    model.to(device)
    batches = batches_to_measure(data, asked["images"])
    top1: list[float] = [_accuracy(model, data, "testing, before")]

    def test(network: nn.Module) -> None:
        top1.append(_accuracy(network, data, "testing, pruned"))

    pruned = prune_network(
        model,
        asked["target_macs"],
        images=batches,
        criterion=asked["criterion"],
        layerwise=asked["layerwise"],
        steps=asked["steps"],
        round_to=asked["round_to"],
        seed=asked["seed"],
        after_step=test,
        progress=lambda values, words: with_progress(values, words, asked["steps"]),
    )
    network = rebuilt(folder, pruned.network.cpu(), pruned.widths)
    latency, left_out = measure_latency(model, rebuilt(folder, pruned.network, pruned.widths).to(device), data)
    fields = pruned_fields(pruned) | {"test_top1": top1, "latency": latency, "latency_left_out": left_out}
    record = cast(PruningRecord, asked | fields)
    write_start(folder, network, pruned.widths, target.path, data)
    with os_errors_as(f"cannot write to {target.path}"):
        write_json(target.path / NAME, record)
    return record


@torch.no_grad()
def _accuracy(network: nn.Module, data: ImageData, words: str) -> float:
    like = next(network.parameters())
    steps = -(-data.test_size // BATCH)
    batches: Iterable[tuple[Tensor, Tensor]] = with_progress(data.test_batches(batch_size=BATCH), words, steps)
    return test_metrics(*collect_logits(lambda x: network(x.to(like)), batches))["test_top1"]


def _print(record: PruningRecord) -> None:
    console = Terminal()
    table = number_table("before", "after", title=f"channels, pruned by {record['criterion']}")
    for layer in record["layers"]:
        if layer["before"] != layer["after"]:
            table.add_row(layer["name"], str(layer["before"]), str(layer["after"]))
    if gone := [block["name"] for block in record["blocks"] if block["gone"]]:
        table.caption = f"gone as a whole: {', '.join(gone)}"
    console.print(table)
    console.print("\n".join(sentences(record)), highlight=False, soft_wrap=True)
