"""Links of the documentation: each leads to something that exists, in the repository and on the site."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("build_site", ROOT / "tools" / "build_site.py")
build_site = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build_site)


@pytest.mark.parametrize(
    ("link", "on_the_site"),
    [
        ("[a](../method.md#four-facts)", "[a](../method.md#four-facts)"),
        ("[a](../../results/LOG.md)", "[a](../results/LOG.md)"),
        ("![a](../competition.png)", "![a](../competition.png)"),
        ("[a](../../CONTRIBUTING.md#tests)", "[a](../contributing.md#tests)"),
        ("[a](../../README.md)", "[a](../index.md)"),
        ("[a](../../results)", "[a](../results.md)"),
        (
            "[a](../../results/experiments/cifar100-16px/README.md)",
            "[a](../results/experiments/cifar100-16px/experiment.md)",
        ),
        ("[a](../../src/cmpe_se/cli.py) b", "a b"),
        ("[a](https://arxiv.org/abs/1807.08920)", "[a](https://arxiv.org/abs/1807.08920)"),
        ("[a](#there)", "[a](#there)"),
        ("[a]: ../../results/LOG.md", "[a]: ../results/LOG.md"),
        ("```python\nx[0](nowhere.md)\n```", "```python\nx[0](nowhere.md)\n```"),
    ],
)
def test_links_are_moved(link, on_the_site):
    assert build_site.with_site_links(link, "docs/commands/train.md") == on_the_site


def test_missing_files_are_named_together():
    with pytest.raises(ValueError, match=r"^docs/index\.md: .*: nowhere\.md, \.\./gone\.csv$"):
        build_site.with_site_links("[a](nowhere.md) [b](method.md) [c](../gone.csv)", "docs/index.md")


def test_all_pages_have_good_links(tmp_path):
    build_site.gather(tmp_path)
    assert (tmp_path / "results" / "LOG.md").is_file()
    assert not list(tmp_path.rglob("result.json"))


def test_navigation_names_every_page(tmp_path):
    build_site.gather(tmp_path)
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = set(re.findall(r"[\w./-]+\.md", yaml.safe_dump(nav)))
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.md")}
    assert named <= written
    assert {path for path in written - named if not path.startswith("results/")} == set()


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
