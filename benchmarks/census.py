"""Will it convert? ``cmpe_se.convert`` on all networks of the libraries that people take networks from.

    python benchmarks/census.py --output build/census
    python benchmarks/census.py --output build/some --library timm,torchvision --only 'resnet*,*regnet*'
    python benchmarks/census.py --output build/families --per-family 1
    python benchmarks/census.py --page results/census/TABLE.csv

Each network is built without weights, run once on the meta device while every operation is recorded (which says what
residual additions there are), and converted. A small one is then run with numbers: is the output the same bit for bit,
has every gate a gradient, are copies and the merged form the same? OUTPUT gets a row for each network as soon as it is
done, in rows.jsonl, and the table when all are. A second start with the same arguments goes on where the first ended.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.census_parts.checks import TOLERANCE, TOLERANCE_FLOAT64, Limits
from benchmarks.census_parts.networks import LIBRARIES, Network, networks
from benchmarks.census_parts.page import page, read_table
from benchmarks.census_parts.processes import rows_of

from cmpe_se.errors import UserError
from cmpe_se.training.provenance import source_commit, write_results

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "conversion-census.md"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    try:
        if options.page:
            write_page(options.page)
        else:
            take(options)
    except (UserError, OSError, ValueError) as error:
        sys.exit(f"census.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\ncensus.py: interrupted; the same command goes on from here")


def _parser() -> argparse.ArgumentParser:
    limits = Limits()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for the rows and the table")
    parser.add_argument("--library", default=",".join(LIBRARIES), help="libraries, with commas (default: %(default)s)")
    parser.add_argument(
        "--only", default="*", metavar="PATTERNS", help="names of networks, with commas; * and ? allowed"
    )
    parser.add_argument(
        "--per-family",
        type=int,
        metavar="N",
        help="of each family the N networks with the shortest names (default: all of them)",
    )
    parser.add_argument(
        "--parameters",
        type=float,
        default=limits.parameters,
        metavar="M",
        help="million parameters of the largest network that is run with numbers (default: %(default)g)",
    )
    parser.add_argument(
        "--macs",
        type=float,
        default=limits.macs,
        metavar="G",
        help="billion multiply-adds of its forward pass, two inputs (default: %(default)g)",
    )
    parser.add_argument(
        "--time", type=float, default=300, metavar="S", help="seconds of processor time for one network (default: 300)"
    )
    parser.add_argument("--memory", type=float, default=6, metavar="GB", help="memory for a process (default: 6)")
    parser.add_argument(
        "--page", type=Path, metavar="TABLE", help=f"write docs/{PAGE.name} of a table, and do nothing else"
    )
    return parser


def take(options: argparse.Namespace) -> None:
    """Take the census that the options describe, or the rest of it."""
    if options.output is None:
        raise UserError("--output needs a folder, for example --output build/census")
    every, chosen = _chosen(options.library.split(","), options.only.split(","), options.per_family)
    limits = Limits(options.parameters, options.macs)
    begun = {"commit": source_commit(), "parameters": limits.parameters, "macs": limits.macs, "versions": _versions()}
    file = options.output / "rows.jsonl"
    rows = _rows_so_far(file, begun)
    left = [network for network in chosen if (network.library, network.name) not in rows]
    print(f"{len(chosen):,} networks, {len(chosen) - len(left):,} of them done before", file=sys.stderr)
    progress = _Progress(len(left))
    with open(file, "a", encoding="utf-8") as opened:
        for row in rows_of(left, limits, options.time, options.memory):
            opened.write(json.dumps(row) + "\n")
            opened.flush()
            rows[row["library"], row["network"]] = row
            progress.show(row)
    path = write_results(
        options.output,
        "census",
        [rows[network.library, network.name] for network in chosen],
        libraries={library: begun["versions"][library] for library in dict.fromkeys(row.library for row in chosen)},
        selection=_selection(len(every), len(chosen), options),
        seeds="0 for parameters and gates, 1 for inputs, 2 and 3 for what a network draws when it runs",
        limits=f"A network was run with numbers if it has up to {limits.parameters:g} million parameters, "
        f"and its forward pass with two inputs up to {limits.macs:g} billion multiply-adds.",
        tolerance=f"{TOLERANCE:g} of the largest output in float32, or {TOLERANCE_FLOAT64:g} in float64 where float32 "
        "does not reach that",
    )
    print(path)


def write_page(table: Path) -> None:
    """Write the documentation's page of a table."""
    head, rows = read_table(table)
    PAGE.write_text(page(f"../{table.resolve().relative_to(ROOT)}", head, rows), encoding="utf-8")
    print(PAGE)


def _selection(every: int, chosen: int, options: argparse.Namespace) -> str:
    """What is counted, for people."""
    if chosen == every:
        return f"All {every:,} networks of the libraries are in the table."
    by_name = "" if options.only == "*" else f" with names like {options.only}"
    by_family = f", of each family the {options.per_family} with the shortest names" if options.per_family else ""
    return f"The table is a selection, {chosen:,} of {every:,} networks{by_name}{by_family}."


def _chosen(libraries: list[str], patterns: list[str], per_family: int | None) -> tuple[list[Network], list[Network]]:
    """All networks of the libraries, and those that are to be counted."""
    if unknown := set(libraries) - set(LIBRARIES):
        raise UserError(f"--library: unknown {', '.join(sorted(unknown))}; choose from {', '.join(LIBRARIES)}")
    try:
        every = list(networks(libraries))
    except ImportError as error:
        raise UserError(f"{error}; install the library, or leave it out with --library") from None
    chosen = [network for network in every if any(fnmatchcase(network.name, pattern) for pattern in patterns)]
    if not chosen:
        raise UserError(f"--only {','.join(patterns)} matches none of {len(every):,} networks")
    if per_family is not None:
        families = defaultdict(list)
        for network in sorted(chosen, key=lambda network: (len(network.name), network.name)):
            families[network.library, network.family].append(network)
        first = {id(network) for members in families.values() for network in members[:per_family]}
        chosen = [network for network in chosen if id(network) in first]
    return every, chosen


def _rows_so_far(file: Path, begun: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of an earlier start, which has to be of the same code and limits; the file begins with what it is of."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(begun) + "\n", encoding="utf-8")
        return {}
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):  # cut off by a kill
        file.write_text("".join(lines[:-1]), encoding="utf-8")
        del lines[-1]
    before, *rows = [json.loads(line) for line in lines]
    if differ := [key for key in begun if before.get(key) != begun[key]]:
        raise UserError(f"{file} was begun with another {', '.join(differ)}; choose another --output, or remove it")
    return {(row["library"], row["network"]): row for row in rows}


def _versions() -> dict[str, str]:
    """Of PyTorch and of the libraries that are installed."""
    return {name: version(name) for name in ("torch", *LIBRARIES) if find_spec(name)}


class _Progress:
    """A line that says how far it is and how long it takes; in a log one in half a minute."""

    def __init__(self, total: int):
        self.total, self.done, self.started, self.last = total, 0, time.monotonic(), 0.0

    def show(self, row: dict[str, Any]) -> None:
        self.done += 1
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if not terminal and now - self.last < 30 and self.done < self.total:
            return
        self.last = now
        minutes = (now - self.started) / self.done * (self.total - self.done) / 60
        line = f"{self.done:,} of {self.total:,}, {minutes:.0f} min left: {row['library']} {row['network']}"
        print(f"\r{line:100.100}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
