"""``docs/conversion-census.md``: what the table of a census says, by family."""

import csv
import json
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmpe_se.utils.escaping import markdown, markdown_code

Row = dict[str, str]

_HEAD = """# Will it convert my network?

[`convert`](convert.md) was run on {networks:,} networks of {libraries}, without trained weights.
[The table]({table}) has a row for each of them; its head
has the command, commit, versions and hardware. This page is made of it (`python benchmarks/census.py --page TABLE`).
{selection}

Each network was also run once while every operation was recorded. That run has nothing in common with the code of
`convert`. It says how many residual additions there are: of two tensors (N, C, ...) of one shape that come from one
tensor, one of which has more convolutions behind it. So what `convert` misses shows.

| | networks |
|---|---:|
"""
_CHECKS = """
{real:,} of the {gated:,} networks with gates were run with numbers, two inputs each, after all norms, scales and
statistics had been randomised. {limits} The others were converted on the meta device, where there are shapes alone.

| check | networks | not so |
|---|---:|---|
"""
_BY_FAMILY = """
## By family

A family is the networks of one module of the library. *All* counts networks of which every residual addition has a
gate, *some* those of which others have none, *none* those that have residual additions and no gate. *Without* counts
networks that have no residual addition of convolutional branches: there is nothing to convert. An addition that joins
several inputs of a module counts too: in a feature pyramid, in the decoder of a U-Net, in an attention block.
"""
_ANSWERS = {
    "all": "every residual addition has a gate",
    "some": "some have a gate",
    "none": "refused, with a reason",
    "without": "no residual addition of convolutional branches",
    "fault": "did not run here",
}
_CHECKED = {
    "equal": "output equal bit for bit",
    "keys": "state-dict keys and values kept",
    "gradient": "a gradient in every parameter of every gate",
    "copies": "`deepcopy`, and `pickle` where the original can be pickled, give the same output",
    "merged": "merged form gives the same output",
}


def read_table(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Head and rows of a census's table.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such table.
    """
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(file)
    head = dict(line[2:].rstrip("\n").split(": ", 1) for line in lines if line.startswith("# "))
    rows = list(csv.DictReader(line for line in lines if not line.startswith("# ")))
    if not rows or "additions" not in rows[0]:
        raise ValueError(f"{path} is no table of a census")
    return {key: json.loads(value) for key, value in head.items()}, rows


def answer(row: Row) -> str:
    """What a row answers, a key of the page's first table."""
    if row["gates"] == "":
        return "fault"
    if row["gates"] == "0":
        return "without" if row["left"] == "0" else "none"
    return "all" if row["left"] == "0" else "some"


def page(table: str, head: dict[str, Any], rows: Sequence[Row]) -> str:
    """The page.

    Args:
        table: link to the table.
        head: of the table.
        rows: of the table.
    """
    answers = Counter(map(answer, rows))
    text = _HEAD.format(
        networks=len(rows),
        libraries=", ".join(dict.fromkeys(row["library"] for row in rows)),
        table=table,
        selection=textwrap.shorten(head["selection"], 150, placeholder=" those in its command."),
    )
    text += "".join(f"| {words} | {answers[key]:,} |\n" for key, words in _ANSWERS.items() if answers[key])
    gated = [row for row in rows if row["gates"] not in ("", "0")]
    real = [row for row in gated if row["run"] == "real"]
    text += _CHECKS.format(real=len(real), gated=len(gated), limits=head["limits"])
    for column, words in _CHECKED.items():
        fine = [row for row in real if holds(row, column)]
        others = [row for row in real if not holds(row, column)]
        text += f"| {words} | {len(fine):,} | {_named(others)} |\n"
    text += "\nMerged outputs count as the same up to " + head["tolerance"] + ".\n"
    text += _disagreements(rows) + _BY_FAMILY
    for library in dict.fromkeys(row["library"] for row in rows):
        text += f"\n### {library} {head['libraries'].get(library, '')}\n\n"
        text += "| family | all | some | none | without | what is left, and why |\n|---|---:|---:|---:|---:|---|\n"
        families = defaultdict(list)
        for row in rows:
            if row["library"] == library:
                families[row["family"]].append(row)
        for family, members in sorted(families.items()):
            counts = Counter(map(answer, members))
            cells = [str(counts[key] or "") for key in ("all", "some", "none", "without")]
            text += f"| {markdown(family)} | {' | '.join(cells)} | {_left(members)} |\n"
    return text


def holds(row: Row, column: str) -> bool:
    """Whether a check of a row that was run with numbers came out well."""
    value = row[column]
    if column == "merged":
        return value != "" and "NOT" not in value
    return value == "yes" or (column == "copies" and value == "deepcopy")


def _disagreements(rows: Sequence[Row]) -> str:
    unlisted = [row for row in rows if row["unlisted"] not in ("", "0")]
    false = [row for row in rows if row["false"] not in ("", "0")]
    faults = [row for row in rows if row["fault"]]
    text = "\nWhere the recorded run and `convert` disagree:\n\n"
    text += f"- residual additions that have no gate and are not listed: {_named(unlisted) or 'in no network'};\n"
    text += f"- gates at what is no such addition: {_named(false) or 'in no network'}.\n"
    if faults:
        text += "\nWhat did not run here, or ended in an error:\n\n"
        text += "".join(f"- {_name(row)}: {markdown(row['fault'])}\n" for row in faults)
    return text


def _left(members: Sequence[Row]) -> str:
    """Why additions of a family are left, the two most frequent reasons first."""
    reasons: Counter[str] = Counter()
    for row in members:
        if answer(row) in ("some", "none"):
            reasons.update(list(dict.fromkeys(_short(reason) for reason in row["reasons"].split(" | "))))
    return markdown("; ".join(reason for reason, _ in reasons.most_common(2)))


def _short(reason: str) -> str:
    """A reason without names of blocks and nodes, and not longer than a line."""
    if listed := re.search(r"that can be converted \((.*)\); competition needs", reason):
        reason = re.sub(r", and \d+ more$", "", listed[1]).partition(": ")[2]
    reason = re.sub(r" \[\d+, [^]]*\]$", "", reason)
    reason = re.sub(r"(^|; )\w+( and \w+)*: (?=it|both)", r"\1", reason)
    return textwrap.shorten(reason, 110, placeholder=" ...")


def _named(rows: Sequence[Row]) -> str:
    names = [_name(row) for row in rows]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _name(row: Row) -> str:
    return markdown_code(f"{row['library']} {row['network']}")
