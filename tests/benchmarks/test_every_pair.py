"""`benchmarks/every_pair.py` against scipy and Holm's method written out."""

import numpy as np
import pytest
from benchmarks.every_pair import accuracies, pairs
from scipy import stats

from cmpe_se.commands.compare.differences import Question

TOP1 = {
    "plain": {0: 70.0, 1: 71.5, 2: 69.8, 3: 70.9},
    "se": {0: 71.1, 1: 72.0, 2: 70.7, 3: 72.3},
    "folded": {0: 71.4, 1: 71.7, 2: 71.3, 3: 72.6, 4: 99.0},  # a seed that the others lack
}


def test_pairs():
    rows = {(row["network"], row["against"]): row for row in pairs(TOP1, Question(1.0, ("folded", "se")))}
    assert list(rows) == [("se", "plain"), ("folded", "plain"), ("folded", "se")]
    for (own, other), row in rows.items():
        difference = np.array([TOP1[own][seed] - TOP1[other][seed] for seed in range(4)])
        assert row["seeds"] == 4
        assert float(row["difference"]) == pytest.approx(difference.mean(), abs=1e-3)
        interval = stats.ttest_1samp(difference, 0).confidence_interval()
        assert (float(row["low"]), float(row["high"])) == pytest.approx(tuple(interval), rel=1e-3)
        assert float(row["p"]) == pytest.approx(stats.ttest_1samp(difference, 0).pvalue, rel=1e-3)
        above = stats.ttest_1samp(difference, -1, alternative="greater").pvalue
        below = stats.ttest_1samp(difference, 1, alternative="less").pvalue
        assert float(row["p_same"]) == pytest.approx(max(above, below), rel=1e-3)
    primary = rows.pop(("folded", "se"))
    assert (primary["role"], primary["p_holm"], primary["p_same_holm"]) == ("primary", None, None)
    for adjusted, alone in (("p_holm", "p"), ("p_same_holm", "p_same")):
        small, large = sorted(rows.values(), key=lambda row: float(row[alone]))
        assert float(small[adjusted]) == pytest.approx(min(1, 2 * float(small[alone])), rel=1e-3)
        assert float(large[adjusted]) == pytest.approx(max(float(large[alone]), float(small[adjusted])), rel=1e-3)


def test_the_table_of_a_comparison(tmp_path):
    lines = ["# command: x", "model,seed,test_top1", "se,1,70.5", "se,2,71", "plain,1,69"]
    (tmp_path / "cells.csv").write_text("\n".join(lines) + "\n")
    assert accuracies(tmp_path / "cells.csv") == {"se": {1: 70.5, 2: 71.0}, "plain": {1: 69.0}}
