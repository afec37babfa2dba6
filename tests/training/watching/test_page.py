"""``progress.html``, ``--profile``, and that neither they nor anything else that watches changes a training."""

import gzip
import json
import os
import re
from html.parser import HTMLParser

import pytest
import torch

from cmpe_se.errors import UserError
from cmpe_se.training import train
from cmpe_se.training.watching import watch as watching
from cmpe_se.training.watching.page import Status, render_page
from cmpe_se.training.watching.profiling import StepProfiler
from cmpe_se.utils.line_charts import Line, line_chart, ticks
from tests.hostile import NAMES
from tests.training.processes import SHORT, start, succeed
from tests.training.runs import assert_same_run, place

QUICK = {"model": "test_resnet", "convert": "pair_view_1x1", "device": "cpu", "batch_size": 256}
RUNNING = Status("running", [("step", "3 of 9")], 600)


class Page(HTMLParser):
    """Texts, tags and attributes of a page; it has to nest well."""

    VOID = ("meta", "path", "circle", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.tags = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(run):
    return Page((run / "progress.html").read_text(encoding="utf-8"))


def test_after_a_run(folded):
    page = page_of(folded)
    assert "finished" in page.texts
    assert "3 of 3" in page.texts
    assert len(page.of("svg")) == 3 + 9
    assert not page.of("script")
    assert not [meta for meta in page.of("meta") if "http-equiv" in meta]
    assert not [each for _, each in page.tags if each.keys() & {"src", "href"}]  # it needs no other file
    for words in ("Loss (cross-entropy)", "Top-1 accuracy, %", "stages.1.blocks.0", "train", "test"):
        assert words in page.texts, words


def test_without_gates(plain):
    page = page_of(plain)
    assert len(page.of("svg")) == 3
    assert "Gates" not in page.texts


@pytest.mark.slow
def test_while_a_run_goes_on_and_after_it_was_stopped(tmp_path):
    running = start("train", *SHORT, "--checkpoint-steps=5", "--output", tmp_path / "run")
    running.until(lambda: place(tmp_path / "run") >= (1, 5))
    page = page_of(tmp_path / "run")
    assert "running" in page.texts
    assert {"http-equiv": "refresh", "content": "10"} in page.of("meta")
    (script,) = (text for text in page.texts if "location.reload" in text)
    assert "10000" in script
    running.send(2)
    page = page_of(tmp_path / "run")
    assert "stopped" in page.texts
    assert not page.of("script")


def test_a_run_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr("cmpe_se.training.trainer.Trainer._test", lambda _: (_ for _ in ()).throw(UserError("<b>no")))
    with pytest.raises(UserError):
        train(**QUICK, epochs=1, output=tmp_path / "run")
    page = page_of(tmp_path / "run")
    assert {"failed", "<b>no"} <= set(page.texts)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_text(name):
    record = {
        "epoch": 1, "step": 2, "lr": 0.1, "train_loss": 1.0, "train_top1": None, "images_per_second": 9.0,
        "seconds": 1.0, "test_images": None, "test_loss": None, "test_top1": None, "test_top5": None,
    }  # fmt: skip
    gate = {"mean": 0.5, "spread": 0.1, "channel_spread": 0.1, "closed": 0, "open": 0, "same": 0, "sleeping": 0}
    gates = [{"epoch": 1, "step": 2, "images": 3, "gates": {name: gate | {"dead": None}}}]
    text = render_page(name, Status("failed", [("run", name)], 1, name), 5, [record], gates, {name: (0.5, 1.0)})
    text.encode()
    plain = render_page("a", Status("failed", [("run", "a")], 1, "a"), 5, [record], [gates[0] | {"gates": {"a": gate | {"dead": None}}}], {"a": (0.5, 1.0)})  # noqa: E501 # fmt: skip
    assert [tag for tag, _ in Page(text).tags] == [tag for tag, _ in Page(plain).tags]
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\u200b]", text)


def test_gates_without_numbers():
    nothing = dict.fromkeys(("mean", "spread", "channel_spread", "closed", "open", "same", "sleeping"))
    gates = [{"epoch": 1, "step": 2, "images": 3, "gates": {"a": nothing | {"dead": "not finite"}}}]
    page = Page(render_page("a", RUNNING, 5, [], gates, {"a": (1.0, 2.0)}))
    assert "dead: not finite" in page.texts
    assert "1 of 1 gates is dead." in page.texts


def test_a_page_that_cannot_be_written_ends_no_training(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise UserError("cannot write progress.html: No space left on device")

    monkeypatch.setattr(watching, "write_text", fail)
    assert train(**QUICK, epochs=2, output=tmp_path / "run")
    assert capsys.readouterr().err.count("progress.html is written no more, training goes on: cannot write") == 1


@pytest.mark.slow
def test_it_is_written_again_when_a_browser_looks_again(tmp_path, monkeypatch):
    """And with every epoch where that is cheap, which these epochs are too short for."""
    written = []
    monkeypatch.setattr(watching, "write_text", lambda path, text: written.append(text))
    monkeypatch.setattr(watching, "_PART", 0.0)
    train(**QUICK, epochs=3, output=tmp_path / "a")
    assert len(written) == 2  # at the start and at the end
    monkeypatch.setattr(watching, "REFRESH", 0.0)
    train(**QUICK, epochs=3, output=tmp_path / "b")
    assert len(written) >= 2 + 2 + 3 + 3  # also with the looks at losses


def test_ticks_and_charts():
    assert ticks(0, 1, most=4) == pytest.approx([0, 0.5, 1])
    assert ticks(1, 3, most=9, whole=True) == [1, 2, 3]
    assert ticks(2, 2, most=3) == [2]
    assert ticks(0.07, 0.1, most=4) == pytest.approx([0.07, 0.08, 0.09, 0.1])
    for points in ([], [(1, 0.0)], [(1, 5.0), (2, 5.0)], [(n, 1e-9 * n) for n in range(1, 2000)]):
        drawn = line_chart([Line("#000", points)], title="<a>", x_range=(1, 2000))
        assert "&lt;a&gt;" in drawn
        assert "nan" not in drawn
        assert len(drawn) < 9000
        Page(drawn)


# The profile


@pytest.mark.long
def test_profile(short_run, tmp_path):
    """Ten steps after five, a table, and the training that it would have been."""
    done = succeed("train", *SHORT, "--profile", "--output", tmp_path / "run")
    assert_same_run(short_run, tmp_path / "run")
    with gzip.open(tmp_path / "run" / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep")}
    assert steps == {f"ProfilerStep#{number}" for number in range(5, 15)}
    assert any(event["name"] == "aten::convolution_backward" for event in events)
    table = done.err[done.err.index("profile of 10 steps") :].splitlines()
    assert len([line for line in table[2:12] if " % " in line]) == 10
    assert f"profile: {tmp_path}/run/trace.json.gz has all of it; open it at https://ui.perfetto.dev" in done.err
    before = (tmp_path / "run" / "trace.json.gz").read_bytes()
    train(resume=tmp_path / "run", epochs=3)
    assert (tmp_path / "run" / "trace.json.gz").read_bytes() == before  # a resumed run has its trace


@pytest.mark.parametrize(("steps", "traced"), [(1, 1), (2, 1), (4, 3), (10, 9), (12, 10), (15, 10), (40, 10)])
def test_short_runs_are_traced_too(steps, traced, tmp_path):
    said = []
    profiler = StepProfiler(tmp_path / "trace.json.gz", steps, torch.device("cpu"), said.append)
    for _ in range(min(steps, 20)):
        torch.ones(3) @ torch.ones(3)
        profiler.step()
    profiler.stop()
    assert said[0].startswith(f"profile of {traced} step")
    assert os.listdir(tmp_path) == ["trace.json.gz"]
    assert len([line for line in said if line.startswith("profile")]) == 2


def test_a_run_that_ends_early_is_traced_as_far_as_it_came(tmp_path):
    said = []
    profiler = StepProfiler(tmp_path / "trace.json.gz", 100, torch.device("cpu"), said.append)
    for _ in range(7):
        torch.ones(3).sum()
        profiler.step()
    profiler.stop()
    assert said[0].startswith("profile of 2 steps")
    profiler = StepProfiler(tmp_path / "second.json.gz", 100, torch.device("cpu"), said.append)
    profiler.step()
    profiler.stop()
    assert said[-1] == "profile: the run has ended before a step could be traced"
    profiler = StepProfiler(tmp_path / "nowhere" / "trace.json.gz", 1, torch.device("cpu"), said.append)
    profiler.step()
    assert said[-1].startswith("profile: no trace is written: cannot write ")
