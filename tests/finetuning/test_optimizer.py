"""An optimizer that existed before learns the gates; one that could not says so."""

import copy

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import lr_scheduler

import cmpe_se
from cmpe_se import CompetitiveSE, add_gates_to_optimizer, convert, freeze_backbone
from cmpe_se.errors import UserError
from tests.finetuning.networks import build, gated, gates, images, snapshot


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01} | settings)


def converted(make=sgd):
    """A network and its optimizer, of before it was converted."""
    model = build("cifar").train()
    optimizer = make(model)
    return convert(model, inplace=True), optimizer


def step(model, optimizer):
    model(images(4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def by_name(groups, model):
    """Groups with names in the place of parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        {key: [names[id(one)] for one in value] if key == "params" else value for key, value in group.items()}
        for group in groups
    ]


OPTIMIZERS = {
    "sgd": sgd,
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.8, 0.95), amsgrad=True),
    "adamw, a tensor": lambda model: torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01)),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01, alpha=0.9),
    "timm lamb": lambda model: create_optimizer_v2(model, "lamb", lr=0.01, weight_decay=0.02),
    "timm lookahead": lambda model: create_optimizer_v2(model, "lookahead_sgd", lr=0.01, momentum=0.9),
    "named": lambda model: torch.optim.SGD(model.named_parameters(), lr=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_gates_learn(make):
    model, optimizer = converted(make)
    step(model, optimizer)  # one that has a state
    numbers = [len(group["params"]) for group in optimizer.param_groups]
    sizes = [sum(parameter.numel() for parameter in group["params"]) for group in optimizer.param_groups]
    like = optimizer.param_groups[sizes.index(max(sizes))]
    group = add_gates_to_optimizer(optimizer, model, lr=0.05)
    assert [len(group["params"]) for group in optimizer.param_groups[:-1]] == numbers
    assert group is optimizer.param_groups[-1]
    assert {id(parameter) for parameter in group["params"]} == {
        id(parameter) for gate in gates(model) for parameter in gate.parameters()
    }
    others = {key: value for key, value in like.items() if key not in ("params", "param_names", "lr")}
    assert {key: group[key] for key in others} == others
    assert float(group["lr"]) == pytest.approx(0.05, rel=1e-6)
    assert type(group["lr"]) is type(like["lr"])
    before = snapshot(model)
    step(model, optimizer)
    step(model, optimizer)
    for name, parameter in model.named_parameters():  # a gate's norm moves by less than its precision, without decay
        assert "map_norm" in name or not torch.equal(parameter, before[name]), name
    assert add_gates_to_optimizer(optimizer, model) is None
    assert add_gates_to_optimizer(optimizer, model, lr=float(group["lr"])) is None
    assert len(optimizer.param_groups) == len(numbers) + 1


def test_as_one_that_was_made_with_the_group():
    model, optimizer = converted()
    other = copy.deepcopy(model)
    add_gates_to_optimizer(optimizer, model, lr=0.02, weight_decay=0.0)
    own = [parameter for name, parameter in other.named_parameters() if ".competition." not in name]
    new = [parameter for gate in gates(other) for parameter in gate.parameters()]
    expected = sgd(other)
    expected = torch.optim.SGD(
        [{"params": own}, {"params": new, "lr": 0.02, "weight_decay": 0.0}], lr=0.1, momentum=0.9, weight_decay=0.01
    )
    for network, one in ((model, optimizer), (other, expected)):
        for _ in range(3):
            step(network, one)
    assert by_name(optimizer.param_groups, model) == by_name(expected.param_groups, other)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_settings_are_those_of_most_of_the_network():
    model = timm.create_model("test_resnet", num_classes=5)
    optimizer = create_optimizer_v2(param_groups_layer_decay(model, 0.05, layer_decay=0.5), "adamw", lr=0.01)
    convert(model, inplace=True)
    sizes = [sum(parameter.numel() for parameter in group["params"]) for group in optimizer.param_groups]
    like = optimizer.param_groups[sizes.index(max(sizes))]
    other = copy.deepcopy(optimizer.state_dict())
    group = add_gates_to_optimizer(optimizer, model)
    assert (group["lr_scale"], group["weight_decay"], group["lr"]) == (like["lr_scale"], 0.05, 0.01)
    optimizer = create_optimizer_v2(
        [p for n, p in model.named_parameters() if ".competition." not in n], "adamw", lr=0.01
    )
    assert other["param_groups"]
    group = add_gates_to_optimizer(optimizer, model, lr=0.1)
    assert group["lr"] == 0.1


def test_resume(tmp_path):
    model, optimizer = converted()
    add_gates_to_optimizer(optimizer, model, lr=0.02)
    step(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    step(model, optimizer)
    saved = torch.load(tmp_path / "checkpoint.pt")
    again, other = converted()
    add_gates_to_optimizer(other, again)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert other.param_groups[-1]["lr"] == 0.02
    step(again, other)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


SCHEDULERS = {
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 2, 0.5),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 6),
    "restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
    "multiplicative": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda epoch: 0.9),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8),
    "cyclic": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=2),
    "sequence": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(optimizer, 5)],
        [3],
    ),
    "chain": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, min_lr=[0.02]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_schedule_goes_on(name, steps):
    """The gates' rate is half of the others' at every step, as it would be had they been there at the start."""
    model, optimizer = converted()
    scheduler = SCHEDULERS[name](optimizer)

    def go_on():
        optimizer.step()
        scheduler.step(*([1.0] if name == "plateau" else []))

    for _ in range(steps):
        go_on()
    if name != "plateau":
        with pytest.raises(UserError, match="a learning rate scheduler was made for this optimizer, and would leave"):
            add_gates_to_optimizer(optimizer, model, lr=0.05)
        assert len(optimizer.param_groups) == 1
    lr = {"plateau": optimizer.param_groups[0]["lr"] / 2, "cyclic": 0.005}.get(name, 0.05)
    add_gates_to_optimizer(optimizer, model, lr=lr, schedulers=scheduler)
    rates = []
    for _ in range(8 - steps - 1):
        rates.append([group["lr"] for group in optimizer.param_groups])
        go_on()
    assert len({rate for rate, _ in rates}) > 1 or name == "plateau"
    for whole, half in rates:
        assert half == pytest.approx(whole / 2, rel=1e-9)
    assert len(scheduler.get_last_lr()) == 2


def test_a_schedule_that_is_made_after():
    model, optimizer = converted()
    add_gates_to_optimizer(optimizer, model, lr=0.05)
    scheduler = lr_scheduler.OneCycleLR(optimizer, [0.1, 0.3], total_steps=5)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[1]["lr"] == pytest.approx(3 * optimizer.param_groups[0]["lr"])


def test_schedulers_that_are_refused():
    model, optimizer = converted()
    schedule = CosineLRScheduler(optimizer, t_initial=5)  # whose zip would leave the gates out without a word
    with pytest.raises(UserError, match="a learning rate scheduler was made for this optimizer"):
        add_gates_to_optimizer(optimizer, model)
    with pytest.raises(
        UserError, match=r"CosineLRScheduler is no scheduler of torch.optim.lr_scheduler; make it after"
    ):
        add_gates_to_optimizer(optimizer, model, schedulers=[schedule])
    other = lr_scheduler.StepLR(sgd(nn.Linear(2, 2)), 2)
    with pytest.raises(UserError, match="StepLR was made for another optimizer; give this one's"):
        add_gates_to_optimizer(optimizer, model, schedulers=other)
    assert len(optimizer.param_groups) == 1
    add_gates_to_optimizer(optimizer, model, lr=0.05, schedulers=())
    schedule = CosineLRScheduler(optimizer, t_initial=5)
    schedule.step(3)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates[1] == pytest.approx(rates[0] / 2)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = build("cifar").train()
    optimizer = sgd(model)
    convert(model, inplace=True)
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    add_gates_to_optimizer(optimizer, model, lr=0.05, schedulers=scheduler)
    before = snapshot(model)
    for _ in range(2):
        accelerator.backward(model(images(4)).square().mean())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert [group["lr"] for group in optimizer.param_groups] == [0.1 / 4, 0.05 / 4]


@pytest.mark.parametrize("wrap", ["compile", "ema"])
def test_wrapped_networks(wrap):
    model, optimizer = converted()
    if wrap == "compile":
        add_gates_to_optimizer(optimizer, torch.compile(model, backend="eager"))
        assert len(optimizer.param_groups) == 2
    else:  # the average is a copy, which no optimizer trains
        with pytest.raises(UserError, match="but others, such as those of the network that it was copied from"):
            add_gates_to_optimizer(optimizer, timm.utils.ModelEmaV3(model))


def test_frozen_gates_and_backbones():
    model, optimizer = converted()
    gates(model)[0].requires_grad_(False)
    group = add_gates_to_optimizer(optimizer, freeze_backbone(model))
    assert len(group["params"]) == sum(len(list(gate.parameters())) for gate in gates(model))
    before = snapshot(model)
    step(model, optimizer)
    step(model, optimizer)
    changed = {
        name.split(".competition")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])
    }
    assert changed == {"layer2.0", "layer3.0"}
    head = nn.Linear(10, 2)
    other = freeze_backbone(gated("cifar"))
    assert add_gates_to_optimizer(sgd(head), other)  # an optimizer for a new head alone


def test_only_what_is_missing_is_added():
    model = gated("cifar")
    first = gates(model)[0]
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if all(p is not q for q in gates(model)[1].parameters())], 0.1
    )
    group = add_gates_to_optimizer(optimizer, model, lr=0.1)
    assert {id(p) for p in group["params"]} == {id(p) for p in gates(model)[1].parameters()}
    assert all(any(p is q for q in optimizer.param_groups[0]["params"]) for p in first.parameters())


def stale(**settings):
    model = build("cifar")
    return convert(model, **settings), sgd(model)


def stale_head():
    """The classic fault, with a new classifier that the optimizer has learnt of."""
    model, optimizer = stale()
    model.fc = nn.Linear(64, 3)
    optimizer.add_param_group({"params": model.fc.parameters()})
    return model, optimizer


def frozen_copy():
    model, optimizer = stale()
    return freeze_backbone(model), optimizer


def original_head_alone():
    model = build("cifar").requires_grad_(False)
    model.fc.requires_grad_(True)
    return convert(model), sgd(model.fc)


def all_frozen():
    model, optimizer = converted()
    for gate in gates(model):
        gate.requires_grad_(False)
    return model, optimizer


COPY = "the optimizer holds parameters like those of this CifarResNet, but others, such as those of the network that it"
REFUSALS = {
    "copy": (stale, COPY),
    "copy with a new head": (stale_head, COPY),
    "frozen copy": (frozen_copy, COPY),
    "head of the original": (original_head_alone, COPY),
    "another network": (
        lambda: (gated("cifar"), sgd(nn.Linear(3, 3))),
        "holds none of the parameters of this CifarRes",
    ),
    "no gates": (lambda: (build("cifar"), sgd(build("cifar"))), "CifarResNet has no gates; cmpe_se.convert adds them"),
    "merged": (lambda: (cmpe_se.merge(gated("cifar")), sgd(build("cifar"))), "this CifarResNet is merged"),
    "a gate": (lambda: (CompetitiveSE(16), sgd(build("cifar"))), "this is a gate by itself"),
    "all frozen": (all_frozen, "all gates are frozen"),
    "one group": (
        lambda: converted(lambda model: torch.optim.LBFGS(model.parameters())),
        "LBFGS takes one group of parameters; make the optimizer after the network has its gates",
    ),
    "there with another rate": (
        lambda: (lambda model: (model, sgd(model)))(gated("cifar")),
        r"layer1.0.competition.\S+ is in group 0 of the optimizer already, with lr 0.1 and not 0.05; make the",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case):
    make, sentence = REFUSALS[case]
    model, optimizer = make()
    groups = len(optimizer.param_groups)
    with pytest.raises(UserError, match=sentence) as error:
        add_gates_to_optimizer(optimizer, model, lr=0.05)
    assert "\n" not in str(error.value)
    assert len(optimizer.param_groups) == groups


@pytest.mark.parametrize(("name", "value"), [("lr", -1.0), ("weight_decay", float("nan"))])
def test_numbers_that_are_none(name, value):
    model, optimizer = converted()
    with pytest.raises(UserError, match=f"{name} has to be a number of at least 0, got {value}"):
        add_gates_to_optimizer(optimizer, model, **{name: value})


def test_two_networks_may_share_an_optimizer():
    one, two = build("cifar"), build("cifar")
    optimizer = torch.optim.SGD([*one.parameters(), *two.parameters()], 0.1)
    convert(one, inplace=True)
    assert add_gates_to_optimizer(optimizer, one)
