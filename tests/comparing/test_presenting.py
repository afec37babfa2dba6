"""Tables of a comparison: the right numbers, and nothing where there is none."""

import io

import pytest
from rich.console import Console
from scipy import stats

from cmpe_se.comparing.presenting import paired_differences, summary_rows, to_markdown, to_rich
from tests.comparing.outcomes import outcome, usual


def cells(text: str, heading: str) -> dict[str, list[str]]:
    """Rows of the first table behind a heading, by their first cell."""
    table = text.split(heading, 1)[1].split("\n\n", 1)[1].split("\n\n")[0].strip().splitlines()
    return {row[0].strip("`"): row[1:] for row in ([c.strip() for c in line.strip("|").split("|")] for line in table)}


def test_rows_by_hand():
    plain, _, pair, _ = summary_rows(usual())
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
    smallest = min(difference.p for difference, _ in differences.values())
    assert min(adjusted for _, adjusted in differences.values()) == pytest.approx(3 * smallest)


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
    difference = paired_differences(outcomes, outcomes[0])["b"][0]
    assert (difference.count, difference.mean) == (2, 1.25)
    assert not paired_differences([outcomes[0], outcome("c", [1], first_seed=7)], outcomes[0])


def test_equal_differences_of_few_seeds_are_no_proof():
    text = to_markdown([outcome("a", [97.5, 98.0]), outcome("b", [98.0, 98.5])], title="", notes=[])
    assert cells(text, "## Against `a`")["b"] == ["+0.50", "", "", "", "no difference shown"]


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


def test_screen_shows_whole_names():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(to_rich(usual()))
    text = "".join(console.export_text().split())
    assert "+1.97±0.14" in text
    assert "cmpe_se_preact_resnet20b:pair_view_1x1" in text
