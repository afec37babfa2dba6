"""Names that are markup, formulas, escapes or of other scripts pass through every output as they are."""

import csv
import io
import json
import os
import re
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cmpe_se.commands.compare.differences import Question
from cmpe_se.commands.compare.plots import plot_differences, plot_learning_curves, plot_pareto
from cmpe_se.commands.compare.presenting import to_markdown, to_rich
from cmpe_se.commands.evaluate import evaluate
from cmpe_se.commands.explore.answers import ATTRIBUTIONS, render
from cmpe_se.commands.explore.network import Networks
from cmpe_se.commands.explore.page import build
from cmpe_se.commands.predict import predict
from cmpe_se.commands.push import push
from cmpe_se.commands.report import report
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.escaping import visible
from cmpe_se.utils.terminal import Terminal
from cmpe_se_command import main
from tests.commands.compare.outcomes import outcome
from tests.hostile import NAMES, write_hostile_folder
from tests.training.processes import complaint_of

LATIN_1 = os.fsdecode("caf\xe9".encode("latin-1"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with one data set whose own name is hostile, and the run on it."""
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def data(place):
    return write_hostile_folder(place / f"data [x] $a^$ {LATIN_1} {'n' * 180}")


@pytest.fixture(scope="module")
def trained(place, data):
    """The run [run] and what the terminal showed of it."""
    run, out, err = place / "[run] $x^$ \x1b[31m", io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMPE_SE_CACHE", str(place / "cache"))
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        settings = ["--data", "folder", "--data-dir", str(data), "--epochs", "1", "--batch-size", "32"]
        status = main(["train", *settings, "--output", str(run), "--device", "cpu", "--workers", "0"])
    assert status == 0, err.getvalue()
    return run, out.getvalue(), err.getvalue()


@pytest.fixture(autouse=True)
def cache(place, monkeypatch):
    monkeypatch.setenv("CMPE_SE_CACHE", str(place / "cache"))
    monkeypatch.setenv("COLUMNS", "400")  # tables that do not fold the names


@pytest.fixture(scope="module")
def classes(trained) -> tuple[str, ...]:
    found = RunFolder(trained[0]).preprocessing().classes
    assert sorted(found) == sorted(NAMES)
    return found


def assert_harmless(text: str) -> None:
    """Nothing that commands a terminal, reorders text or cannot be encoded."""
    text.encode()
    hidden = {one for one in text if unicodedata.category(one) in {"Cc", "Cf", "Cs"}} - {"\n"}
    assert hidden == set(), hidden


def read_csv(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def as_cell(name: str) -> str:
    text = visible(name)
    return f"'{text}" if text[0] in "=+@" else text


def test_train(trained):
    run, out, err = trained
    assert_harmless(out + err)
    assert json.loads(out)["run"] == str(run)
    assert visible(str(run)) in err
    assert json.loads((run / "result.json").read_text())["test_images"] == len(NAMES)
    assert len(list((run.parent / "cache").iterdir())) == 1


def test_evaluate(trained, classes, capsys, recwarn):
    evaluate(str(trained[0]), workers=0)
    shown = capsys.readouterr().out
    assert_harmless(shown)
    for name in ("[x]", ":cat:", "[bold red]loud[", "\\x1b[31mred"):
        assert name in shown, name
    folder = trained[0] / "evaluation"
    assert [row[0] for row in read_csv(folder / "per_class.csv")[1:]] == [as_cell(name) for name in classes]
    assert read_csv(folder / "confusion.csv")[0][1:] == [as_cell(name) for name in classes]
    written = (folder / "evaluation.json").read_text()
    assert "\\ud" not in written
    assert len(json.loads(written)["per_class"]) == len(NAMES)
    assert [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)] == []
    assert len(list((trained[0].parent / "cache").iterdir())) == 1  # the cache of training was found


def test_predict(trained, data, classes, capsys):
    said = predict(str(trained[0]), [str(data / "[x]"), str(data / LATIN_1)], top=len(NAMES))
    assert {entry["class"] for entry in said[0]["classes"]} == set(classes)
    assert Path(said[-1]["image"]).is_file()  # as returned it can be opened
    shown = capsys.readouterr().out
    assert_harmless(shown)
    assert "data [x]" in shown
    predict(str(trained[0]), str(data / LATIN_1), top=len(NAMES), as_json=True)
    for line in capsys.readouterr().out.splitlines():
        assert line.isascii()
        assert "\\ud" not in line.lower()
        record = json.loads(line)
        assert "caf\\xe9" in record["image"]
        assert len({entry["class"] for entry in record["classes"]}) == len(NAMES)


class _Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def assert_only_our_html(text: str) -> None:
    assert_harmless(text)
    page = _Page(text)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert all(attributes["src"].startswith("data:") for tag, attributes in page.tags if tag == "img")


@pytest.mark.slow
def test_report(trained, classes, tmp_path, capsys, caplog, recwarn):
    made = report(str(trained[0]), output=str(tmp_path / f"[out] {LATIN_1}"))
    text = Path(made["page"]).read_text(encoding="utf-8")
    assert_only_our_html(text)
    assert_harmless(capsys.readouterr().out)
    folder = Path(made["page"]).parent
    assert {row[0] for row in read_csv(folder / "confusion.csv")[1:]} == {as_cell(name) for name in classes}
    for table in folder.glob("*.csv"):
        cells = [cell for row in read_csv(table) for cell in row]
        assert not [cell for cell in cells if cell[:1] in ("=", "+", "@", "\t", "\r")], table
    assert [str(warning.message) for warning in recwarn if "lyph" in str(warning.message)] == []
    assert len([record for record in caplog.records if "lyph" in record.message]) == 0
    assert len([record for record in caplog.records if "no installed font" in record.message]) <= 1


def test_explore(trained, classes):
    networks = Networks([RunFolder(trained[0])])
    assert networks.names == ["[run] $x^$ \\x1b[31m"]
    network = networks[networks.names[0]]
    truths = set()
    for picture in network.examples:
        assert_harmless(picture.caption)
        truths.add(picture.classes[picture.truth])
        if LATIN_1 in (picture.predicted, classes[picture.truth]):
            break
    shown = network.examples[0]
    text = render(
        networks.names[0],
        network,
        network.photo(shown),
        block=network.blocks[0],
        force=None,
        attribution=ATTRIBUTIONS[0],
    )
    assert_only_our_html(text)
    config = json.dumps(build(networks).get_config_file(), ensure_ascii=False, default=str)
    config.encode()  # what the browser gets is UTF-8


def test_compare(tmp_path):
    labels = ["plain", *(name for name in NAMES if name != "-1")]
    outcomes = [outcome(label, [70.0, 71.0 + 0.1 * place, 70.5]) for place, label in enumerate(labels)]
    title = f"{len(outcomes)} networks on {LATIN_1} *a* <b>"
    text = to_markdown(outcomes, title=title, notes=[], question=Question(primary=(labels[1], labels[0])))
    assert_harmless(text)
    assert text.splitlines()[0].endswith("on caf\\\\xe9 \\*a\\* \\<b\\>")
    tables = [line for line in text.splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in tables if "a\\|b`c`d" in line or "`plain`" in line}
    assert len(tables) > 60
    assert all(line.endswith("|") for line in tables)
    assert len(widths) == 3  # main table, differences, seeds
    assert "``a\\|b`c`d``" in text
    console = Terminal(file=io.StringIO(), width=200)
    console.print(to_rich(outcomes, Question(primary=(labels[1], labels[0]))))
    shown = console.file.getvalue()
    assert_harmless(shown)
    assert "[bold red]loud[" in shown
    for plot in (plot_pareto, plot_learning_curves, plot_differences):
        plot(outcomes, title, tmp_path / f"{plot.__name__}.png")
        assert (tmp_path / f"{plot.__name__}.png").stat().st_size > 10_000


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_terminals_of_another_encoding(trained, data, encoding, monkeypatch):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))  # as PYTHONIOENCODING makes them
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["predict", str(trained[0]), str(data / "猫")]) == 0
    assert main(["predict", str(trained[0]), "猫"]) == 1
    for stream in (out, err):
        stream.flush()
    assert b"\\u732b" in out.buffer.getvalue()
    assert b"no image at \\u732b" in err.buffer.getvalue()


def test_folders_for_weights_have_names_in_utf_8(trained, tmp_path):
    where = tmp_path / LATIN_1  # safetensors would write there, and not find it again
    for arguments in (["train", "--output", where], ["push", trained[0], where]):
        assert "caf\\xe9 has a name that is not UTF-8; name another one" in complaint_of(*arguments)
    assert not where.exists()


def test_push(trained, tmp_path):
    push(str(trained[0]), str(tmp_path / 'a "quoted" $x$ [folder]'))
    card = (tmp_path / 'a "quoted" $x$ [folder]' / "README.md").read_text(encoding="utf-8")
    assert_harmless(card)
    line = next(line for line in card.splitlines() if line.startswith("model = "))
    compile(line, "card", "exec")


def test_every_figure_is_written_by_one_function():
    """Else its names would be mathtext again."""
    sources = (Path(__file__).parents[1] / "src" / "cmpe_se").rglob("*.py")
    writers = {source.name for source in sources if ".savefig(" in source.read_text()}
    assert writers == {"figures.py"}
