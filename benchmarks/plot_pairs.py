"""The pairs of several comparisons side by side: what holds in one setting, and does it in the next?

    python benchmarks/plot_pairs.py --output results/experiments/cifar100-16px/settings.png \
      "CIFAR-10, 32 px=results/experiments/cifar100-16px/second-c10-10k" "another title=its folder"

Draws mean and 95 % interval of each pair of networks, read from the `every_pair.csv` that `every_pair.py` has written
into each folder; the primary pair comes first. The networks of all of them have to be the same.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from cmpe_se.errors import UserError
from cmpe_se.training.provenance import read_table
from cmpe_se.utils.figures import save_figure
from cmpe_se.utils.plots import BLUE, GREY, ORANGE

_STYLES = ((GREY, "o"), (BLUE, "s"), (ORANGE, "D"), ("#009E73", "^"))
_PAPER = (0.29, 0.47)  # points, its 1x1 view less its SE on CIFAR-10 and on CIFAR-100 (METHOD.md)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparisons", nargs="+", metavar="TITLE=FOLDER", help="a comparison, and its name in the plot")
    parser.add_argument("--output", type=Path, required=True, help="PNG file")
    options = parser.parse_args()
    try:
        titled = [comparison.rpartition("=")[::2] for comparison in options.comparisons]
        if len({title for title, _ in titled} - {""}) < len(titled):
            raise UserError("each comparison needs a title of its own: TITLE=FOLDER")
        plot({title: read_pairs(Path(folder) / "every_pair.csv") for title, folder in titled}, options.output)
    except (UserError, OSError) as error:
        parser.error(str(error))


def read_pairs(path: Path) -> list[dict[str, str]]:
    """The rows of an ``every_pair.csv``, the primary pair first."""
    return sorted(read_table(path), key=lambda row: row["role"] != "primary")


def plot(settings: dict[str, list[dict[str, str]]], path: Path) -> None:
    """Write the figure.

    Args:
        settings: rows of :func:`read_pairs` by the setting's title; at most four.
        path: PNG file.

    Raises:
        UserError: other pairs in one setting than in another.
    """
    if len(settings) > len(_STYLES):
        raise UserError(f"{len(settings)} comparisons are too many to tell apart; at most {len(_STYLES)}")
    names = [_name(row) for row in next(iter(settings.values()))]
    figure = Figure(figsize=(9, 0.62 * len(names) + 1.9), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.axvline(0, color="#999999", linewidth=1)
    step = 0.7 / len(settings)
    for index, ((title, rows), (colour, marker)) in enumerate(zip(settings.items(), _STYLES, strict=False)):
        if [_name(row) for row in rows] != names:
            raise UserError(f"'{title}' has other pairs of networks than '{next(iter(settings))}'")
        means, lows, highs = ([float(row[key]) for row in rows] for key in ("difference", "low", "high"))
        places = [row + step * (index - (len(settings) - 1) / 2) for row in range(len(names))]
        axes.hlines(places, lows, highs, color=colour, linewidth=2.5)
        label = f"{title}, {rows[0]['seeds']} seeds"
        axes.plot(means, places, marker, color=colour, markersize=6, linestyle="none", label=label)
    for number, name in enumerate(names):
        if name.endswith("(primary)"):
            axes.fill_between(_PAPER, number - 0.45, number + 0.45, color="#dddddd", linewidth=0, zorder=-1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xlabel(
        "difference in points of test top-1: mean and 95 % interval, not adjusted\n"
        "grey: what the paper reports for its 1x1 view less SE"
    )
    figure.legend(loc="outside upper center", ncols=len(settings), frameon=False, fontsize=9)
    save_figure(figure, path, dpi=150, tight=True)


def _name(row: dict[str, str]) -> str:
    own, other = (_gate(row[key]) for key in ("network", "against"))
    return f"{own} less {other}{' (primary)' if row['role'] == 'primary' else ''}"


def _gate(network: str) -> str:
    """``preact_resnet20:se`` is ``se``, and a name alone is the plain network."""
    return network.partition(":")[2] or "plain"


if __name__ == "__main__":
    main()
