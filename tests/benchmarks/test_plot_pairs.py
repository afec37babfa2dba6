"""`benchmarks/plot_pairs.py`: which pairs it draws, and what it refuses."""

import pytest
from benchmarks.plot_pairs import main, plot, read_pairs

HEAD = "# margin: 1\nnetwork,against,role,seeds,difference,low,high\n"
PLAIN = "m:se,m,secondary,3,0.5,-0.5,1.5\n"
PRIMARY = "m:folded_3x3,m:se,primary,3,0.25,0.125,0.375\n"


@pytest.fixture
def comparisons(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "every_pair.csv").write_text(HEAD + PLAIN + PRIMARY)
    return tmp_path


def test_every_pair_of_every_setting_is_drawn(comparisons, monkeypatch):
    drawn = []
    monkeypatch.setattr("benchmarks.plot_pairs.save_figure", lambda figure, path, **_: drawn.append(figure))
    rows = read_pairs(comparisons / "first/every_pair.csv")
    plot({"one": rows, "other": rows}, comparisons / "pairs.png")
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["folded_3x3 less se (primary)", "se less plain"]
    for line in axes.get_lines()[1:]:  # after the line at 0
        assert list(line.get_xdata()) == [0.25, 0.5]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["one, 3 seeds", "other, 3 seeds"]


def test_the_command(comparisons, monkeypatch):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["plot_pairs.py", "--output", str(comparisons / "pairs.png"), *arguments])
        main()

    call(f"a=b, c={comparisons}/first", f"other={comparisons}/second")
    assert (comparisons / "pairs.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("titles", [("", "b="), ("a=", "a=")])
def test_comparisons_need_titles_of_their_own(titles, comparisons, monkeypatch, capsys):
    folders = [f"{title}{comparisons}/first" for title in titles]
    monkeypatch.setattr("sys.argv", ["plot_pairs.py", "--output", str(comparisons / "pairs.png"), *folders])
    with pytest.raises(SystemExit):
        main()
    assert "each comparison needs a title of its own: TITLE=FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("second", "sentence"),
    [(HEAD + PLAIN, "'other' has other pairs of networks than 'one'"), (None, "No such file or directory")],
)
def test_what_cannot_be_drawn(second, sentence, comparisons, monkeypatch, capsys):
    path = comparisons / "second/every_pair.csv"
    path.unlink() if second is None else path.write_text(second)
    folders = [f"one={comparisons}/first", f"other={comparisons}/second"]
    monkeypatch.setattr("sys.argv", ["plot_pairs.py", "--output", str(comparisons / "pairs.png"), *folders])
    with pytest.raises(SystemExit):
        main()
    assert sentence in capsys.readouterr().err
    assert not (comparisons / "pairs.png").exists()
