"""The outcomes of a comparison as tables: for programs, for GitHub, and for the screen."""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any, TypedDict, cast

from rich.table import Table

from cmpe_se.commands.compare.differences import USUAL, Comparison, Question, paired_differences, primary_comparison
from cmpe_se.commands.compare.outcomes import Outcome
from cmpe_se.commands.compare.statistics import Difference, summarise
from cmpe_se.utils.escaping import markdown, markdown_code
from cmpe_se.utils.tables import number_table
from cmpe_se.utils.text import counted, duration, in_points

_METHOD = """For one seed, all networks were trained on the same images in the same order with the same augmentation. \
So seeds are compared in pairs: difference of the means with its 95 % t-interval, two-sided paired t-test, and Hedges' \
g_z, the mean over the standard deviation of the differences. {adjusted} A verdict is given at a p below 0.05:

- **better**, **worse**: a difference has been shown.
- **the same within {margin}**: two one-sided paired t-tests (p same) have shown that the true difference is \
less than {margin} (`--margin`) in either direction. "Better, by less than {margin}" says that both \
have been shown.
- **no difference shown**: neither. {seeds} could not show a difference, which does not say that there is none.

**80 % power from** is the true difference in points that these seeds show in four of five such comparisons (paired \
t-test, two-sided 5 %, before Holm), if the standard deviation of the differences is the observed one. With few seeds \
that is a rough number. `cmpe-se compare --plan --effect POINTS --sd POINTS` says how many seeds another difference \
needs; the standard deviations are in `compare.csv` (`difference_std`)."""
_ALL_ADJUSTED = "p (Holm) and p same (Holm) are adjusted by Holm's method for all comparisons of a table."
_SECONDARY_ADJUSTED = (
    "The primary comparison (`--primary`) is one planned test, which is not adjusted. All others are secondary; their "
    "p (Holm) and p same (Holm) are adjusted by Holm's method for the secondary comparisons of a table."
)
_DIGITS = (
    {"p": 5, "p_holm": 5, "p_same": 5, "p_same_holm": 5, "primary_p": 5, "primary_p_same": 5}
    | dict.fromkeys(
        ("effect", "detectable", "difference_std", "latency_ms", "latency_ratio", "latency_low", "latency_high"), 3
    )
    # Pages show two, and half of an interval between ends of two digits can be a hundredth off.
    | {f"{name}_{end}": 4 for name in ("top1", "difference", "primary") for end in ("mean", "low", "high")}
)
"""Digits behind the point, where they are not 2."""
_PIPE = r"\|"  # in code too, within a table of GitHub


class ComparisonRow(TypedDict):
    """A line of ``compare.csv``, rounded; :func:`summary_rows` says what is None."""

    model: str
    seeds: int
    top1_mean: float
    top1_low: float | None
    top1_high: float | None
    top1_std: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    p: float | None
    p_holm: float | None
    effect: float | None
    difference_std: float | None
    detectable: float | None
    p_same: float | None
    p_same_holm: float | None
    verdict: str | None
    role: str | None
    primary_against: str | None
    primary_difference: float | None
    primary_low: float | None
    primary_high: float | None
    primary_p: float | None
    primary_p_same: float | None
    primary_verdict: str | None
    params: int
    macs: int
    train_seconds: float
    latency_ms: float | None
    latency_ratio: float | None
    latency_low: float | None
    latency_high: float | None
    published: float | None


def summary_rows(outcomes: Sequence[Outcome], question: Question = USUAL) -> list[ComparisonRow]:
    """A row for each network, with its difference to the first one; None where something is not known.

    ``role`` is primary or secondary where a primary comparison was named. Columns that begin with primary_ are in the
    row of that comparison's first network.
    """
    differences = paired_differences(outcomes, outcomes[0], question)
    primary = primary_comparison(outcomes, question)
    rows = []
    for outcome in outcomes:
        summary = summarise(list(outcome.seeds.values()))
        compared = differences.get(outcome.label)
        difference = compared.difference if compared else None
        adjusted = compared if compared and not compared.primary else None
        main = primary if question.primary and outcome.label == question.primary[0] else None
        latency = outcome.latency
        row: ComparisonRow = {
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
            "p_holm": adjusted.p if adjusted else None,
            "effect": difference.effect if difference else None,
            "difference_std": difference.std if difference else None,
            "detectable": compared.detectable if compared else None,
            "p_same": compared.same_alone if compared else None,
            "p_same_holm": adjusted.same if adjusted else None,
            "verdict": compared.verdict if compared else None,
            "role": _role(compared) if compared and question.primary else None,
            "primary_against": question.primary[1] if main and question.primary else None,
            "primary_difference": main.difference.mean if main else None,
            "primary_low": main.difference.low if main else None,
            "primary_high": main.difference.high if main else None,
            "primary_p": main.p if main else None,
            "primary_p_same": main.same if main else None,
            "primary_verdict": main.verdict if main else None,
            "params": outcome.params,
            "macs": outcome.macs,
            "train_seconds": median(outcome.train_seconds),
            "latency_ms": latency.milliseconds if latency else None,
            "latency_ratio": latency.ratio if latency else None,
            "latency_low": latency.low if latency else None,
            "latency_high": latency.high if latency else None,
            "published": outcome.published,
        }
        rows.append(cast(ComparisonRow, {name: _rounded(name, value) for name, value in row.items()}))
    return rows


def to_markdown(
    outcomes: Sequence[Outcome],
    *,
    title: str,
    notes: Sequence[str],
    question: Question = USUAL,
    sections: Sequence[str] = (),
) -> str:
    """A document for GitHub: tables against the first network and against SE, every seed, and how to read them.

    Args:
        outcomes: networks with at least one finished run, the first one being what the others are compared with.
        title: of the document.
        notes: sentences about data, hardware and command.
        question: margin, and the primary comparison, which comes before everything else.
        sections: of other measures, in Markdown, before every seed's numbers.
    """
    seeds = max(len(outcome.seeds) for outcome in outcomes)
    parts = [f"# {markdown(title)}"]
    if question.primary:
        parts += [_primary_section(outcomes, question, *question.primary), "## All networks"]
    parts += [_main_table(outcomes)]
    parts += filter(None, (difference_table(outcomes, reference, question) for reference in references(outcomes)))
    parts += [*sections, "## Every seed", _seed_table(outcomes)]
    adjusted = _SECONDARY_ADJUSTED if question.primary else _ALL_ADJUSTED
    method = _METHOD.format(seeds=counted(seeds, "seed"), margin=in_points(question.margin), adjusted=adjusted)
    parts += ["## How to read this", method, "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def to_rich(outcomes: Sequence[Outcome], question: Question = USUAL) -> Table:
    """The most important columns, for the screen."""
    rows, differences = summary_rows(outcomes), paired_differences(outcomes, outcomes[0], question)
    columns = ("top-1", "difference", "p", "latency")
    table = number_table(*columns, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left")
    adjusted = "p by Holm except the primary one" if question.primary else "p by Holm"
    table.caption = f"difference to the first network with half its 95 % interval, {adjusted}; compare.md has the rest"
    primary = primary_comparison(outcomes, question)
    if primary and question.primary:
        own, other = question.primary
        p = f", p {p_value(primary.p)}" if p_value(primary.p) else ""
        answer = f"{_plus_minus(primary.difference)}{p}: {primary.verdict}"
        table.caption = f"primary: {own} against {other} {answer}\n{table.caption}"
    for row in rows:
        compared = differences.get(row["model"])
        table.add_row(
            row["model"],
            f"{row['top1_mean']:.2f}",
            _plus_minus(compared.difference) if compared else "",
            p_value(compared.p) if compared else "",
            "" if row["latency_ratio"] is None else f"{row['latency_ratio']:.3f}",
        )
    return table


def references(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """What the others are compared with: the first network, and SE where there are others behind both."""
    se = [outcome for outcome in outcomes[1:] if _is_se(outcome.label)]
    return [outcomes[0], *(se[:1] if len(outcomes) > 2 else [])]


def _is_se(label: str) -> bool:
    model, *rest = label.split(":")
    views = [part for part in rest if "=" not in part]
    return views == ["se"] or (not views and model.startswith("se_"))


def _main_table(outcomes: Sequence[Outcome]) -> str:
    head = ["network", "top-1, %", "seeds", "parameters", "multiply-adds", "training", "latency", "paper, %"]
    rows = []
    for row in summary_rows(outcomes):
        half = half_interval(row["top1_low"], row["top1_high"])
        latency = ""
        if row["latency_ratio"] is not None:
            latency = f"{row['latency_ratio']:.3f} ({row['latency_low']:.3f} to {row['latency_high']:.3f})"
        published = "" if row["published"] is None else f"{row['published']:.2f}"
        rows.append(
            [markdown_code(row['model']), f"{row['top1_mean']:.2f}{half}", str(row["seeds"]), f"{row['params']:,}",
             f"{row['macs'] / 1e6:,.2f} M", duration(row["train_seconds"]), latency, published]
        )  # fmt: skip
    empty = {column for column in range(len(head)) if not any(row[column] for row in rows)}
    return markdown_table(*([cell for i, cell in enumerate(row) if i not in empty] for row in (head, *rows)))


def _primary_section(outcomes: Sequence[Outcome], question: Question, own: str, other: str) -> str:
    heading = f"## Primary comparison: {markdown_code(own)} against {markdown_code(other)}\n\n"
    compared = primary_comparison(outcomes, question)
    if compared is None:
        return heading + "No seed of both has finished."
    head = ["network", "difference in points", "p", "effect g_z", "80 % power from", "p same", ""]
    own_p = p_value(compared.p)
    row = [markdown_code(own), _interval(compared.difference), own_p, *_strength(compared), compared.verdict]
    return heading + markdown_table(head, row)


def difference_table(
    outcomes: Sequence[Outcome], reference: Outcome, question: Question, *, heading: str = "## Against"
) -> str:
    """Differences to a reference, but for the primary one; to SE only those of the networks behind it, the plain one
    being its own table.

    Empty where no other network shares a seed with the reference.
    """
    others = [outcome for outcome in outcomes if outcome is not outcomes[0]]
    head = ["network", "difference in points", "p", "p (Holm)", "effect g_z", "80 % power from", "p same (Holm)", ""]
    rows = [
        [markdown_code(label), _interval(compared.difference), p_value(compared.difference.p), p_value(compared.p),
         *_strength(compared), compared.verdict]
        for label, compared in paired_differences(others, reference, question).items()
        if not compared.primary
    ]  # fmt: skip
    if not rows:
        return ""
    secondary = " (secondary)" if question.primary else ""
    return f"{heading} {markdown_code(reference.label)}{secondary}\n\n" + markdown_table(head, *rows)


def _strength(compared: Comparison) -> list[str]:
    """Effect size, detectable effect and p of the equivalence test as cells."""
    numbers = (compared.difference.effect, compared.detectable)
    return [*("" if math.isnan(number) else f"{number:.2f}" for number in numbers), p_value(compared.same)]


def _seed_table(outcomes: Sequence[Outcome]) -> str:
    seeds = sorted(set().union(*(outcome.seeds for outcome in outcomes)))
    head = ["network", *(f"seed {seed}" for seed in seeds)]
    rows = [
        [
            markdown_code(outcome.label),
            *(f"{outcome.seeds[seed]:.2f}" if seed in outcome.seeds else "" for seed in seeds),
        ]
        for outcome in outcomes
    ]
    return markdown_table(head, *rows)


def _role(compared: Comparison) -> str:
    return "primary" if compared.primary else "secondary"


def p_value(p: float) -> str:
    """A p value as text; nothing for NaN."""
    return "" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def _interval(difference: Difference) -> str:
    if math.isnan(difference.low):
        return f"{difference.mean:+.2f}"
    return f"{difference.mean:+.2f} ({difference.low:+.2f} to {difference.high:+.2f})"


def half_interval(low: float | None, high: float | None) -> str:
    """Half of an interval as it follows a mean; nothing where there is none."""
    return "" if low is None or high is None else f" ± {(high - low) / 2:.2f}"


def _plus_minus(difference: Difference) -> str:
    if math.isnan(difference.low):
        return f"{difference.mean:+.2f}"
    return f"{difference.mean:+.2f} ± {difference.high - difference.mean:.2f}"


def markdown_table(head: Sequence[str], *rows: Sequence[str]) -> str:
    """A table for GitHub, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', _PIPE) for cell in line)} |" for line in lines)


def _rounded(name: str, value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, float):
        return value
    return round(value, _DIGITS.get(name, 2))
