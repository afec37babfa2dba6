"""The outcomes of a comparison as tables: for programs, for GitHub, and for the screen."""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from rich import box
from rich.table import Table

from cmpe_se.comparing.outcomes import Outcome
from cmpe_se.comparing.statistics import Difference, compare_paired, holm, summarise
from cmpe_se.wording import duration

SIGNIFICANT = 0.05
_METHOD = (
    "For one seed all networks saw the same images in the same order with the same augmentation, so seeds are compared "
    "in pairs: difference of the means with its 95 % t-interval, two-sided paired t-test, p adjusted by Holm for all "
    "comparisons of a table, and Hedges' g_z, the mean difference over the spread of the differences. 'better' and "
    "'worse' are said at an adjusted p below 0.05; 'no difference shown' means that {seeds} seed(s) could not show "
    "one, not that there is none."
)


def paired_differences(outcomes: Sequence[Outcome], reference: Outcome) -> dict[str, tuple[Difference, float]]:
    """Each other network's difference to the reference over the seeds they share, with its Holm-adjusted p."""
    found: dict[str, Difference] = {}
    for outcome in outcomes:
        shared = sorted(outcome.seeds.keys() & reference.seeds.keys())
        if outcome.label != reference.label and shared:
            own, others = ([each.seeds[seed] for seed in shared] for each in (outcome, reference))
            found[outcome.label] = compare_paired(own, others)
    adjusted = holm([difference.p for difference in found.values()])
    return {label: (found[label], p) for label, p in zip(found, adjusted, strict=True)}


def summary_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row for each network, with differences to the first one; None where something is not known."""
    differences = paired_differences(outcomes, outcomes[0])
    rows = []
    for outcome in outcomes:
        summary = summarise(list(outcome.seeds.values()))
        difference, adjusted = differences.get(outcome.label, (None, math.nan))
        latency = outcome.latency
        row = {
            "model": outcome.label,
            "seeds": summary.count,
            "top1_mean": summary.mean,
            "top1_low": summary.low,
            "top1_high": summary.high,
            "top1_std": summary.std,
            "difference": difference.mean if difference else None,
            "difference_low": difference.low if difference else None,
            "difference_high": difference.high if difference else None,
            "p": difference.p if difference else None,
            "p_holm": adjusted,
            "effect": difference.effect if difference else None,
            "params": outcome.params,
            "macs": outcome.macs,
            "train_seconds": median(outcome.train_seconds),
            "latency_ms": latency.milliseconds if latency else None,
            "latency_ratio": latency.ratio if latency else None,
            "latency_low": latency.low if latency else None,
            "latency_high": latency.high if latency else None,
            "published": outcome.published,
        }
        rows.append({name: _rounded(name, value) for name, value in row.items()})
    return rows


def to_markdown(outcomes: Sequence[Outcome], *, title: str, notes: Sequence[str], sections: Sequence[str] = ()) -> str:
    """A document for GitHub: tables against the first network and against SE, every seed, and how to read them.

    Args:
        outcomes: networks with at least one finished run, the first one being what the others are compared with.
        title: of the document.
        notes: sentences about data, hardware and command.
        sections: of other measures, in Markdown, before every seed's numbers.
    """
    seeds = max(len(outcome.seeds) for outcome in outcomes)
    parts = [f"# {title}", _main_table(outcomes)]
    parts += filter(None, (_difference_table(outcomes, reference) for reference in references(outcomes)))
    parts += [*sections, "## Every seed", _seed_table(outcomes)]
    parts += ["## How to read this", _METHOD.format(seeds=seeds), "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def to_rich(outcomes: Sequence[Outcome]) -> Table:
    """What matters most of it, for the screen."""
    rows, differences = summary_rows(outcomes), paired_differences(outcomes, outcomes[0])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left")
    table.caption = "difference to the first network with half its 95 % interval, p by Holm; compare.md has the rest"
    table.add_column("", overflow="fold")
    for column in ("top-1", "difference", "p", "latency"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        difference, p = differences.get(row["model"], (None, math.nan))
        table.add_row(
            row["model"],
            f"{row['top1_mean']:.2f}",
            _plus_minus(difference) if difference else "",
            p_value(p),
            "" if row["latency_ratio"] is None else f"{row['latency_ratio']:.3f}",
        )
    return table


def references(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """What the others are compared with: the first network, and SE where there are others behind both."""
    se = [outcome for outcome in outcomes[1:] if outcome.label.startswith("se_") or outcome.label.endswith(":se")]
    return [outcomes[0], *(se[:1] if len(outcomes) > 2 else [])]


def _main_table(outcomes: Sequence[Outcome]) -> str:
    head = ["network", "top-1, %", "seeds", "parameters", "multiply-adds", "training", "latency", "paper, %"]
    rows = []
    for row in summary_rows(outcomes):
        half = f" ± {(row['top1_high'] - row['top1_low']) / 2:.2f}" if row["top1_low"] is not None else ""
        latency = ""
        if row["latency_ratio"] is not None:
            latency = f"{row['latency_ratio']:.3f} ({row['latency_low']:.3f} to {row['latency_high']:.3f})"
        published = "" if row["published"] is None else f"{row['published']:.2f}"
        rows.append(
            [f"`{row['model']}`", f"{row['top1_mean']:.2f}{half}", str(row["seeds"]), f"{row['params']:,}",
             f"{row['macs'] / 1e6:,.2f} M", duration(row["train_seconds"]), latency, published]
        )  # fmt: skip
    empty = {column for column in range(len(head)) if not any(row[column] for row in rows)}
    return markdown_table(*([cell for i, cell in enumerate(row) if i not in empty] for row in (head, *rows)))


def _difference_table(outcomes: Sequence[Outcome], reference: Outcome) -> str:
    """Differences to a reference; to SE only those of the networks behind it, the plain one being its own table.

    Empty where no other network shares a seed with the reference.
    """
    others = [outcome for outcome in outcomes if outcome is not outcomes[0]]
    head = ["network", "difference in points", "p", "p (Holm)", "effect g_z", ""]
    rows = []
    differences = paired_differences(others, reference)
    if not differences:
        return ""
    for label, (difference, adjusted) in differences.items():
        effect = "" if math.isnan(difference.effect) else f"{difference.effect:.2f}"
        tested = [p_value(difference.p), p_value(adjusted), effect, _verdict(difference, adjusted)]
        rows.append([f"`{label}`", _interval(difference), *tested])
    return f"## Against `{reference.label}`\n\n" + markdown_table(head, *rows)


def _seed_table(outcomes: Sequence[Outcome]) -> str:
    seeds = sorted(set().union(*(outcome.seeds for outcome in outcomes)))
    head = ["network", *(f"seed {seed}" for seed in seeds)]
    rows = [
        [f"`{outcome.label}`", *(f"{outcome.seeds[seed]:.2f}" if seed in outcome.seeds else "" for seed in seeds)]
        for outcome in outcomes
    ]
    return markdown_table(head, *rows)


def _verdict(difference: Difference, adjusted: float) -> str:
    if not adjusted < SIGNIFICANT:
        return "no difference shown"
    return "better" if difference.mean > 0 else "worse"


def p_value(p: float) -> str:
    """A p value as text; nothing for NaN."""
    return "" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def _interval(difference: Difference) -> str:
    if math.isnan(difference.low):
        return f"{difference.mean:+.2f}"
    return f"{difference.mean:+.2f} ({difference.low:+.2f} to {difference.high:+.2f})"


def _plus_minus(difference: Difference) -> str:
    if math.isnan(difference.low):
        return f"{difference.mean:+.2f}"
    return f"{difference.mean:+.2f} ± {difference.high - difference.mean:.2f}"


def markdown_table(head: Sequence[str], *rows: Sequence[str]) -> str:
    """A table for GitHub, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rounded(name: str, value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, float):
        return value
    digits = 5 if name.startswith("p") and name != "published" else 3 if name.startswith(("latency", "effect")) else 2
    return round(value, digits)
