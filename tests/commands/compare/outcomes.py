"""Outcomes as a comparison would find them, with numbers of our choice."""

from cmpe_se.commands.compare.outcomes import Latency, Outcome


def outcome(label, accuracies, *, ratio=1.0, first_seed=0, **fields) -> Outcome:
    """A network with these accuracies; its curves end at them."""
    seeds = dict(enumerate(accuracies, start=first_seed))
    tops = (None, 0.8, None, 1.0)  # only every second epoch was tested
    curves = {
        seed: [
            {"epoch": epoch, "train_loss": 1 / epoch, "test_top1": top and top * accuracy}
            for epoch, top in enumerate(tops, start=1)
        ]
        for seed, accuracy in seeds.items()
    }
    latency = Latency(60 * ratio, ratio, ratio - 0.01, ratio + 0.02)
    return Outcome(label, 219_482, 33_700_000, seeds, [300.0 + 10 * seed for seed in seeds], curves, latency)._replace(
        **fields
    )


def usual() -> list[Outcome]:
    """Plain, SE and two competitive views, three seeds."""
    return [
        outcome("preact_resnet20b", [70.0, 71.0, 70.5]),
        outcome("se_preact_resnet20b", [71.0, 72.1, 71.4], ratio=1.05),
        outcome("cmpe_se_preact_resnet20b:pair_view_1x1", [71.9, 73.0, 72.5], ratio=1.07),
        outcome("cmpe_se_preact_resnet20b:folded_3x3", [70.0, 71.5, 70.1], ratio=1.08),
    ]
