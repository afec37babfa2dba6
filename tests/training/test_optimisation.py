"""Optimisers' own arguments and state, the moving average, and mixup in parts of a batch."""

from pathlib import Path

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from cmpe_se.data import load_data
from cmpe_se.training.checkpoint import Checkpoints
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.loss import create_loss
from cmpe_se.training.optimisation import create_mixup, create_optimizer, ema_decay
from cmpe_se.training.restoring import restore


def _optimizer(network: nn.Module, **settings) -> torch.optim.Optimizer:
    return create_optimizer(TrainingConfig(**settings), network, 10)[0]


def test_arguments_reach_the_optimizer(tmp_path):
    settings = {"optimizer": "adamw", "optimizer_args": {"eps": 1e-3, "betas": [0.8, 0.9], "amsgrad": True}}
    group = _optimizer(nn.Linear(2, 2), **settings).param_groups[0]
    assert (group["eps"], group["betas"], group["amsgrad"]) == (1e-3, (0.8, 0.9), True)
    # From a file, where YAML takes 1e-3 for text; and back from what a run writes.
    path = tmp_path / "recipe.yaml"
    path.write_text("optimizer: adamw\noptimizer_args: {eps: 1e-3, betas: [0.8, 0.9], amsgrad: true}\n")
    config = TrainingConfig.from_recipe(path)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    for again in (config, TrainingConfig.of_run(tmp_path / "config.yaml", as_written=True)):
        group = create_optimizer(again, nn.Linear(2, 2), 10)[0].param_groups[0]
        assert (group["eps"], group["betas"], group["amsgrad"]) == (1e-3, (0.8, 0.9), True)


def test_weight_decay_and_momentum_of_lamb():
    """Weights decay, norms and biases do not; LAMB has no momentum of its own."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    groups = _optimizer(network, optimizer="lamb", weight_decay=0.02).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert [decays[id(p)] for p in network.parameters()] == [0.02, 0, 0, 0]


KRON = pytest.param("kron", marks=pytest.mark.long)  # it compiles for half a minute


@pytest.mark.parametrize("name", ["lamb", "adamw", "sgd", "rmsproptf", "lion", "adafactorbv", KRON])
def test_state_survives_a_checkpoint(name: str, tmp_path: Path):
    """Two steps, and one, a checkpoint and one more, are the same bit for bit."""

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
        return network, _optimizer(network, optimizer=name, lr=0.01)

    def step(network: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        network(torch.randn(5, 2, 4, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    whole, optimizer = fresh()
    step(whole, optimizer, 1)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"network": whole.state_dict(), "optimizer": optimizer.state_dict()})
    step(whole, optimizer, 2)
    again, other = fresh()
    tree, path = checkpoints.load()
    restore([(again, tree["network"])], other, tree["optimizer"], path)
    step(again, other, 2)
    for first, second in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second)


def test_a_resumed_run_has_the_arguments_of_its_settings(tmp_path):
    """The state is that of the checkpoint, and what the optimiser was made with that of the settings."""
    network = nn.Linear(2, 2)
    before = _optimizer(network, optimizer="lamb", weight_decay=0.01)
    network(torch.ones(1, 2)).sum().backward()
    before.step()
    settings = {"weight_decay": 0.3, "optimizer_args": {"eps": 0.5, "betas": (0.5, 0.6)}}
    after = _optimizer(network, optimizer="lamb", **settings)
    state = before.state_dict()
    restore([(network, network.state_dict())], after, state, tmp_path)
    assert {group["weight_decay"] for group in after.param_groups} == {0.0, 0.3}  # none for the bias
    assert {(group["eps"], group["betas"]) for group in after.param_groups} == {(0.5, (0.5, 0.6))}
    assert [group["step"] for group in after.param_groups] == [group["step"] for group in before.param_groups]
    assert all(torch.equal(after.state[p]["exp_avg"], before.state[p]["exp_avg"]) for p in network.parameters())


def test_tuples_are_what_a_file_makes_of_them(tmp_path):
    config = TrainingConfig(optimizer="adamw", optimizer_args={"betas": (0.9, 0.98)})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert TrainingConfig.of_run(tmp_path / "config.yaml") == config


def test_the_average_reaches_back_over_as_many_images():
    small = TrainingConfig(ema=0.999, batch_size=64)
    large = TrainingConfig(ema=0.999, batch_size=512, ema_batch_size=64)
    assert ema_decay(small) == 0.999
    assert ema_decay(large) == pytest.approx(0.999**8)
    # Weights that stand still for eight small steps, or for one large one, move the average alike.
    averages = []
    for config, steps in ((small, 8), (large, 1)):
        network = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(network.weight)
        average = ModelEmaV3(network, decay=ema_decay(config))
        nn.init.ones_(network.weight)
        for step in range(steps):
            average.update(network, step=10 + step)  # its first steps copy the weights
        averages.append(average.module.weight.item())
    assert averages[0] == pytest.approx(averages[1], rel=1e-5)
    assert averages[0] == pytest.approx(1 - 0.999**8, rel=1e-5)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_mixup_in_parts_gives_the_gradient_of_the_batch(loss: str):
    """A batch is mixed as a whole, then divided: in float64 and without batch statistics the parts add up."""
    settings = {"mixup": 0.4, "cutmix": 1.0, "batch_size": 12, "loss": loss, "label_smoothing": 0.1}
    config, data = TrainingConfig(**settings), load_data("digits")
    mixup = create_mixup(config, data, 1)
    torch.manual_seed(0)
    images, labels = torch.randn(12, 1, 8, 8), torch.randint(10, (12,))
    images, targets = mixup(images, labels)
    assert (targets.max(1).values < 1).any()
    network, criterion = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double(), create_loss(config, None)
    gradients = []
    for parts in (1, 3):
        network.zero_grad()
        for part, wanted in zip(images.double().chunk(parts), targets.double().chunk(parts), strict=True):
            (criterion(network(part), wanted, label_smoothing=0.0) * len(part) / 12).backward()
        gradients.append(network[1].weight.grad.clone())
    torch.testing.assert_close(*gradients)
