"""Each pair of networks of a comparison, with one family of adjusted tests, for protocols that ask for that.

    python benchmarks/every_pair.py --comparison results/experiments/cifar100-16px/stage2-s-10k \
      --primary preact_resnet20:folded_3x3,preact_resnet20:se --margin 1

`cmpe-se compare` sets networks against the first one and against SE, a family each. Here all pairs but the primary one
are one family of Holm's method, separately for the paired t-test (`p_holm`) and for the equivalence test
(`p_same_holm`). Reads `cells.csv` and writes `every_pair.csv` beside it. A pair's order is that of the comparison, the
later network less the earlier one.
"""

import argparse
from itertools import combinations
from pathlib import Path
from typing import Any

from cmpe_se.commands.compare.differences import Question, ask
from cmpe_se.commands.compare.statistics import compare_paired, equivalence_p, holm
from cmpe_se.errors import UserError
from cmpe_se.training.provenance import read_table, write_table
from cmpe_se.utils.text import in_points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparison", type=Path, required=True, help="folder with cells.csv")
    parser.add_argument("--primary", required=True, help="A,B: two networks, whose p are not adjusted")
    parser.add_argument("--margin", type=float, required=True, help="largest difference in points that counts as none")
    options = parser.parse_args()
    try:
        top1 = accuracies(options.comparison / "cells.csv")
        rows = pairs(top1, ask(options.primary, options.margin, list(top1)))
    except (UserError, OSError) as error:
        parser.error(str(error))
    write_table(options.comparison / "every_pair.csv", rows, margin=in_points(options.margin))


def accuracies(path: Path) -> dict[str, dict[int, float]]:
    """Test accuracy in percent, by network and seed."""
    found: dict[str, dict[int, float]] = {}
    for row in read_table(path):
        found.setdefault(row["model"], {})[int(row["seed"])] = float(row["test_top1"])
    return found


def pairs(top1: dict[str, dict[int, float]], question: Question) -> list[dict[str, Any]]:
    """A row for each pair, over the seeds that both have."""
    rows: list[dict[str, Any]] = []
    for other, own in combinations(top1, 2):
        seeds = sorted(top1[own].keys() & top1[other].keys())
        values = [[top1[name][seed] for seed in seeds] for name in (own, other)]
        found = compare_paired(*values)
        rows.append(
            {
                "network": own,
                "against": other,
                "role": "primary" if question.is_primary(own, other) else "secondary",
                "seeds": len(seeds),
                "difference": found.mean,
                "low": found.low,
                "high": found.high,
                "std": found.std,
                "p": found.p,
                "p_holm": None,
                "p_same": equivalence_p(*values, question.margin),
                "p_same_holm": None,
            }
        )
    secondary = [row for row in rows if row["role"] == "secondary"]
    for adjusted, alone in (("p_holm", "p"), ("p_same_holm", "p_same")):
        for row, p in zip(secondary, holm([row[alone] for row in secondary]), strict=True):
            row[adjusted] = p
    return [
        {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows
    ]


if __name__ == "__main__":
    main()
