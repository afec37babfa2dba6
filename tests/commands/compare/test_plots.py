"""Figures of a comparison: what they draw, and that they stand whatever is missing."""

import warnings
from itertools import pairwise

import pytest
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from cmpe_se.commands.compare import plots
from cmpe_se.commands.compare.differences import Question
from cmpe_se.commands.compare.plots import plot_differences, plot_learning_curves, plot_pareto
from tests.commands.compare.outcomes import outcome, usual

PLOTS = [plot_pareto, plot_learning_curves, plot_differences]


@pytest.fixture
def drawn(monkeypatch):
    """Figures that were saved, in order."""
    saved = []
    save = Figure.savefig

    def record(figure, *args, **kwargs):
        saved.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", record)
    return saved


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize(
    "outcomes",
    [
        usual(),
        [outcome("a", [70])],
        [outcome("a", [70]), outcome("b", [71])],
        [outcome("a", [70, 71], latency=None), outcome("b", [71], first_seed=5)],
        [outcome("a", [70, 71]), outcome("b", [71, 72], curves={})],
        [outcome("a", [70, 71]), outcome("b", [70.5, 71.5])],
        [outcome(f"network_{n}", [70 + n / 10 + seed for seed in range(10)]) for n in range(12)],
    ],
    ids=["usual", "one", "one seed", "no latency, no shared seed", "no curves", "same differences", "twelve"],
)
def test_figures_stand(plot, outcomes, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot(outcomes, "A title", tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.format == "PNG"
        assert 900 < image.width < 2000
        assert 150 < image.height < 1600


def test_a_dozen_networks_look_different():
    looks = [tuple(look) for _, *look in plots._styled([outcome(f"{number}", [70]) for number in range(12)])]
    assert len(set(looks)) == 12


@pytest.mark.parametrize(
    ("places", "front"),
    [
        ([(1, 70), (2, 72), (3, 71), (4, 73)], [(1, 70), (2, 72), (4, 73)]),
        ([(2, 70), (1, 72)], [(1, 72)]),
        ([(1, 70), (1, 71), (2, 71)], [(1, 71)]),
        ([(1, 70)], [(1, 70)]),
    ],
)
def test_the_front_has_what_nothing_beats(places, front):
    assert plots._pareto_front(places) == front


def test_names_do_not_lie_on_each_other(drawn, tmp_path):
    plot_pareto([outcome(f"n{n}", [70 + n / 100, 71]) for n in range(12)], "", tmp_path / "figure.png")
    (axes,) = drawn[0].axes
    boxes = sorted((text.get_window_extent() for text in axes.texts if text.get_text()), key=lambda box: box.y0)
    assert len(boxes) == 12
    assert all(low.y1 <= high.y0 for low, high in pairwise(boxes))


def test_without_all_latencies_the_cost_is_multiply_adds(drawn, tmp_path):
    plot_pareto(usual(), "", tmp_path / "figure.png")
    plot_pareto([*usual()[:3], usual()[3]._replace(latency=None)], "", tmp_path / "figure.png")
    assert [figure.axes[0].get_xlabel().split(",")[0] for figure in drawn] == [
        "time of a forward pass", "multiply-adds of an image",
    ]  # fmt: skip


def test_curves_are_means_of_tested_epochs(drawn, tmp_path):
    plot_learning_curves(usual(), "", tmp_path / "figure.png")
    whole, end = drawn[0].axes
    epochs, tops = whole.lines[0].get_data()
    assert list(epochs) == [2, 4]
    assert list(tops) == pytest.approx([0.8 * 70.5, 70.5])
    assert list(end.lines[0].get_xdata()) == [4]


def test_a_network_looks_the_same_in_each_plot(drawn, tmp_path):
    """Also where the plain network is left out, which is not compared with SE once more."""
    order = [each.label for each in usual()]
    plot_differences(usual(), "", tmp_path / "all.png")
    plot_differences(usual()[1:], "", tmp_path / "some.png", reference=order[1], order=order)

    def colours(figure) -> dict[str, tuple]:
        (axes,) = figure.axes
        names = [label.get_text() for label in axes.get_yticklabels()]
        return {name: tuple(dots.get_facecolor()[0]) for name, dots in zip(names, axes.collections[::2], strict=True)}

    first, second = map(colours, drawn)
    assert len(second) == len(order) - 2
    assert second == {name: first[name] for name in second}


def test_the_margin_is_shown(drawn, tmp_path):
    plot_differences(usual(), "", tmp_path / "figure.png", question=Question(margin=0.4))
    (axes,) = drawn[0].axes
    (band,) = [patch for patch in axes.patches if patch.get_width() == pytest.approx(0.8)]
    assert band.get_x() == pytest.approx(-0.4)
    assert "grey: within 0.4 points" in texts(drawn[0])


def test_one_tested_epoch_is_no_curve(drawn, tmp_path):
    once = [each._replace(curves={seed: curve[-1:] for seed, curve in each.curves.items()}) for each in usual()]
    path = tmp_path / "curves.png"
    path.write_bytes(b"of an earlier report")
    plot_learning_curves(once, "t", path)
    assert drawn == []
    assert not path.exists()


def test_differences_are_to_the_reference(drawn, tmp_path):
    se = "se_preact_resnet20b"
    plot_differences(usual(), "", tmp_path / "figure.png", reference=se)
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [o.label for o in usual() if o.label != se]
    assert sorted(axes.collections[0].get_offsets()[:, 0]) == pytest.approx([-1.1, -1.0, -0.9])
    assert f"Difference to {se}" in texts(drawn[0])
    assert "-0.97   p " in texts(drawn[0])


def test_the_primary_comparison_is_marked(drawn, tmp_path):
    plain, se, *_ = usual()
    plot_differences(usual(), "", tmp_path / "figure.png", question=Question(primary=(plain.label, se.label)))
    marked = [text for text in texts(drawn[0]).splitlines() if text.endswith("(primary)")]
    assert marked == [f"+1.00   p {stats.ttest_rel([71, 72.1, 71.4], [70, 71, 70.5]).pvalue:.3f} (primary)"]
    assert "by Holm but for the primary" in texts(drawn[0])


@pytest.mark.parametrize("accuracies", [[70, 95], [99.8, 100], [0, 1], [70, 70.2, 71]])
def test_accuracies_lie_between_0_and_100_whatever_the_intervals(accuracies, drawn, tmp_path):
    outcomes = [outcome("a", accuracies), outcome("b", [max(each - 0.3, 0) for each in accuracies])]
    plot_learning_curves(outcomes, "t", tmp_path / "curves.png")
    plot_pareto(outcomes, "t", tmp_path / "pareto.png")
    for axes in (*drawn[0].axes, drawn[1].axes[0]):
        low, high = axes.get_ylim()
        assert 0 <= low < high <= 100
    for axes in drawn[0].axes:
        low, high = axes.get_xlim()
        assert all(tick == int(tick) for tick in axes.get_xticks() if low <= tick <= high)


def test_the_band_is_the_range_of_the_seeds(drawn, tmp_path):
    plot_learning_curves([outcome("a", [70, 95])], "t", tmp_path / "curves.png")
    band = drawn[0].axes[0].collections[0].get_paths()[0].vertices
    assert {round(y, 6) for x, y in band if x == 4} == {70, 95}
    assert "band: lowest to highest seed" in texts(drawn[0])


def test_intervals_of_two_seeds_do_not_hide_the_seeds(drawn, tmp_path):
    outcomes = [outcome("a", [70, 71]), outcome("b", [70.5, 71.9])]
    plot_differences(outcomes, "t", tmp_path / "differences.png")
    plot_pareto(outcomes, "t", tmp_path / "pareto.png")
    low, high = drawn[0].axes[0].get_xlim()
    assert (low, high) == pytest.approx((-0.9, 1.8))  # 0 to 0.9, and as much beside it
    assert drawn[1].axes[0].get_ylim() == pytest.approx((68.1, 73.8))
    assert all("wide intervals cut" in texts(figure) for figure in drawn)
