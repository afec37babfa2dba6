"""Tables of a comparison: the right numbers, and nothing where there is none."""

import io
import math
from typing import get_type_hints

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from cmpe_se.commands.compare.differences import Question, ask, paired_differences
from cmpe_se.commands.compare.power import detectable_effect
from cmpe_se.commands.compare.presenting import ComparisonRow, references, summary_rows, to_markdown, to_rich
from cmpe_se.commands.compare.statistics import equivalence_p
from cmpe_se.errors import UserError
from tests.commands.compare.outcomes import outcome, usual


def cells(text: str, heading: str) -> dict[str, list[str]]:
    """Rows of the first table behind a heading, by their first cell."""
    table = text.split(heading, 1)[1].split("\n\n", 1)[1].split("\n\n")[0].strip().splitlines()
    return {row[0].strip("`"): row[1:] for row in ([c.strip() for c in line.strip("|").split("|")] for line in table)}


def test_rows_by_hand():
    plain, _, pair, _ = summary_rows(usual())
    assert list(plain) == list(get_type_hints(ComparisonRow))
    assert (plain["top1_mean"], plain["top1_std"], plain["seeds"]) == (70.5, 0.5, 3)
    assert plain["difference"] is plain["p"] is plain["p_holm"] is plain["effect"] is plain["published"] is None
    assert pair["difference"] == 1.97  # 1.9, 2.0, 2.0
    assert pair["p"] == pytest.approx(stats.ttest_rel([71.9, 73, 72.5], [70, 71, 70.5]).pvalue, abs=1e-5)
    assert pair["p_holm"] > pair["p"]
    assert (pair["train_seconds"], pair["latency_ratio"], pair["latency_low"]) == (310, 1.07, 1.06)
    assert (pair["params"], pair["macs"]) == (219_482, 33_700_000)


def test_holm_counts_the_comparisons_of_a_table():
    outcomes = usual()
    differences = paired_differences(outcomes, outcomes[0])
    smallest = min(compared.difference.p for compared in differences.values())
    assert min(compared.p for compared in differences.values()) == pytest.approx(3 * smallest)
    likest = min(compared.same_alone for compared in differences.values())
    assert min(compared.same for compared in differences.values()) == pytest.approx(3 * likest)


def test_markdown_has_both_references_and_a_verdict():
    text = to_markdown(usual(), title="A comparison", notes=["One note."])
    against_plain, against_se = cells(text, "## Against `preact_resnet20b`"), cells(text, "## Against `se_")
    assert against_plain["cmpe_se_preact_resnet20b:pair_view_1x1"][-1] == "better"
    assert against_plain["cmpe_se_preact_resnet20b:folded_3x3"][-1] == "no difference shown"
    assert against_se["cmpe_se_preact_resnet20b:folded_3x3"][-1] == "worse"
    assert "preact_resnet20b" not in against_se
    seeds = cells(text, "## Every seed")
    assert seeds["se_preact_resnet20b"] == ["71.00", "72.10", "71.40"]
    assert text.startswith("# A comparison\n")
    assert "- One note." in text
    assert "paper" not in text.split("##")[0]
    assert "nan" not in text


def test_half_an_interval_is_rounded_once():
    accuracies = [72.17, 74.05, 72.70, 72.89, 71.71, 73.76, 73.88, 71.77]  # 0.7924, between ends of two digits 0.795
    text = to_markdown([outcome("a", accuracies)], title="", notes=[])
    assert "72.87 ± 0.79" in text


def test_worse_is_said():
    text = to_markdown([outcome("a", [70, 71, 72]), outcome("b", [68, 69.1, 70])], title="", notes=[])
    assert cells(text, "## Against `a`")["b"][-1] == "worse"


def test_published_figures_have_a_column():
    own = usual()
    own[1] = own[1]._replace(published=95.15)
    text = to_markdown(own, title="", notes=[])
    assert "| paper, % |" in text
    assert "| 95.15 |" in text


def test_only_shared_seeds_are_paired():
    outcomes = [outcome("a", [70, 71, 72]), outcome("b", [72, 73.5, 60], first_seed=1)]
    difference = paired_differences(outcomes, outcomes[0])["b"].difference
    assert (difference.count, difference.mean) == (2, 1.25)
    assert not paired_differences([outcomes[0], outcome("c", [1], first_seed=7)], outcomes[0])


def test_equal_differences_of_few_seeds_are_no_proof():
    text = to_markdown([outcome("a", [97.5, 98.0]), outcome("b", [98.0, 98.5])], title="", notes=[])
    assert cells(text, "## Against `a`")["b"] == ["+0.50", "", "", "", "", "", "no difference shown"]


def test_no_table_without_a_shared_seed():
    text = to_markdown([outcome("a", [70]), outcome("b", [71], first_seed=5)], title="", notes=[])
    assert "## Against" not in text


def test_few_seeds_leave_cells_empty():
    rows = summary_rows([outcome("a", [70]), outcome("b", [71], latency=None)])
    assert rows[1]["difference"] == 1
    assert all(rows[1][name] is None for name in ("top1_low", "top1_std", "p", "p_holm", "effect", "latency_ms"))
    text = to_markdown([outcome("a", [70]), outcome("b", [71])], title="", notes=[])
    assert "nan" not in text
    assert "| 71.00 |" in text


@pytest.mark.parametrize(
    ("own", "margin", "verdict"),
    [
        ([70.01, 70.98, 69.52, 70.49], 0.2, "the same within 0.2 points"),
        ([70.01, 70.98, 69.52, 70.49], 0.01, "no difference shown"),
        ([70.9, 70.2, 69.9, 70.1], 0.2, "no difference shown"),
        ([70.1, 71.11, 69.61, 70.6], 0.2, "better, by less than 0.2 points"),
        ([69.9, 70.89, 69.39, 70.4], 0.5, "worse, by less than 0.5 points"),
        ([71.0, 72.1, 70.4, 71.5], 0.2, "better"),
    ],
)
def test_the_same_and_nothing_shown_are_two_answers(own, margin, verdict):
    plain = [70.0, 71.0, 69.5, 70.5]
    outcomes = [outcome("a", plain), outcome("b", own)]
    text = to_markdown(outcomes, title="", notes=[], question=Question(margin))
    row = cells(text, "## Against `a`")["b"]
    assert row[-1] == verdict
    std = np.std(np.subtract(own, plain), ddof=1)
    assert row[4] == f"{detectable_effect(std, 4):.2f}"
    assert f"less than {margin:g} points (`--margin`)" in " ".join(text.split())
    rows = summary_rows(outcomes, Question(margin))
    assert rows[1]["p_same"] == pytest.approx(equivalence_p(own, plain, margin), abs=1e-5)
    assert (rows[1]["verdict"], rows[1]["difference_std"]) == (verdict, pytest.approx(std, abs=1e-3))
    assert rows[0]["verdict"] is rows[0]["p_same"] is rows[0]["detectable"] is None


PLAIN, SE, PAIR, FOLDED = (each.label for each in usual())


@pytest.mark.parametrize("primary", [(PAIR, PLAIN), (PLAIN, PAIR), (FOLDED, SE), (FOLDED, PAIR)])
def test_the_primary_comparison_comes_first_and_alone(primary):
    question, outcomes = Question(primary=primary), usual()
    own, other = (next(each for each in outcomes if each.label == label) for label in primary)
    test = stats.ttest_rel(list(own.seeds.values()), list(other.seeds.values()))
    text = to_markdown(outcomes, title="Title", notes=[], question=question)
    heading = f"## Primary comparison: `{own.label}` against `{other.label}`"
    assert text.startswith(f"# Title\n\n{heading}\n")
    row = cells(text, heading)[own.label]
    mean = np.mean(np.subtract(list(own.seeds.values()), list(other.seeds.values())))
    assert row[0].startswith(f"{mean:+.2f} (")
    assert row[1] == ("<0.001" if test.pvalue < 0.001 else f"{test.pvalue:.3f}")
    for reference in (PLAIN, SE):
        secondary = cells(text, f"## Against `{reference}` (secondary)")
        left = {PLAIN, SE, PAIR, FOLDED} - {PLAIN, reference}
        left -= {*primary} if reference in primary else set()
        assert {*secondary} - {"network", "---"} == left
        differences = paired_differences(outcomes[reference == SE :], outcomes[reference == SE], question)
        alone = {label: differences[label].difference.p for label in left}
        assert differences[min(alone, key=alone.get)].p == pytest.approx(min(1, len(left) * min(alone.values())))
    rows = {row["model"]: row for row in summary_rows(outcomes, question)}
    for label in (SE, PAIR, FOLDED):
        assert rows[label]["role"] == ("primary" if {label, PLAIN} == {*primary} else "secondary")
    assert [label for label in rows if rows[label]["primary_against"]] == [own.label]
    assert rows[own.label]["primary_against"] == other.label
    assert rows[own.label]["primary_p"] == pytest.approx(test.pvalue, abs=1e-5)
    assert rows[own.label]["primary_difference"] == pytest.approx(mean, abs=0.006)
    assert rows[own.label]["primary_verdict"] == row[-1]
    assert all((row["p_holm"] is None) == (row["role"] != "secondary") for row in rows.values())
    console = Console(width=200, file=io.StringIO())
    console.print(to_rich(outcomes, question))
    shown = "".join(console.file.getvalue().split())  # captions are wrapped
    assert f"primary:{own.label}against{other.label}{mean:+.2f}" in shown


def test_a_primary_comparison_without_a_shared_seed_says_so():
    outcomes = [outcome("a", [70]), outcome("b", [71], first_seed=5)]
    text = to_markdown(outcomes, title="", notes=[], question=Question(primary=("b", "a")))
    assert "## Primary comparison: `b` against `a`\n\nNo seed of both has finished.\n" in text
    text = to_markdown(outcomes[:1], title="", notes=[], question=Question(primary=("b", "a")))
    assert "No seed of both has finished." in text


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("a:b", ("a", "b")),
        ("b,a", ("b", "a")),
        ("a:se:b", ("a:se", "b")),
        ("b:a:se:reduction=2", ("b", "a:se:reduction=2")),
        ("a:se:reduction=2:a:se", ("a:se:reduction=2", "a:se")),
        ("a:se,a", ("a:se", "a")),
    ],
)
def test_a_primary_comparison_is_read(text, pair):
    assert ask(text, 0.3, ["a", "b", "a:se", "a:se:reduction=2"]) == Question(0.3, pair)


@pytest.mark.parametrize(
    ("primary", "margin", "complaint"),
    [
        ("a:c", 0.2, "primary 'a:c' is not two networks of this comparison; it has a, b, b:se, se, se:a"),
        ("a", 0.2, "primary 'a' is not two networks"),
        ("a:a", 0.2, "primary 'a:a' is not two networks"),
        ("b:se:a", 0.2, "primary 'b:se:a' can be read in two ways; write A,B"),
        (None, 0, "margin is 0, should be a number of points above 0, such as 0.2"),
        (None, math.nan, "margin is nan"),
    ],
)
def test_questions_that_cannot_be(primary, margin, complaint):
    with pytest.raises(UserError, match=complaint):
        ask(primary, margin, ["a", "b", "b:se", "se", "se:a"])


def test_se_is_told_by_its_view():
    plain, *others = [outcome(label, [70, 71]) for label in ("a", "se_a:folded_3x3", "a:se:reduction=2", "se_a")]
    assert [each.label for each in references([plain, *others])] == ["a", "a:se:reduction=2"]
    assert [each.label for each in references([plain, others[0], others[2]])] == ["a", "se_a"]


def test_screen_shows_whole_names():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(to_rich(usual()))
    text = "".join(console.export_text().split())
    assert "+1.97±0.14" in text
    assert "cmpe_se_preact_resnet20b:pair_view_1x1" in text
