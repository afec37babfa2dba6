"""Build the documentation site into ``build/site``, without internet: ``python tools/build_site.py``.

Pages link to files beside ``docs/`` (rows in ``results/``, examples, CONTRIBUTING.md), so that they can be followed in
the repository. A site generator knows ``docs/`` alone. This script gathers the pages and those files in
``build/site-source``, points the links there, and runs Zensical on it. A link to what does not exist is an error; a
link to a file that the site does not carry becomes its text.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "build" / "site-source"  # mkdocs.yml names it too
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CITATION.cff": "CITATION.cff",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",  # in links only: docs/index.md is the page
    "SECURITY.md": "security.md",
    "results": "results.md",
}
"""Paths of the repository to the site's, where they are not those below ``docs/``."""
FOLDERS = ("examples", "results")
"""Folders whose files the site carries under their own names."""
_LINK = re.compile(
    r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)|^\[(?P<name>[^\]]+)\]: (?P<where>\S+)$", re.M
)
_FENCE = re.compile(r"(^```.*?^```$)", re.M | re.S)


def site_path(path: str) -> str | None:
    """Where the site has a path of the repository; None if it does not carry it."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == "results/README.md":
        return PAGES["results"]
    if path.startswith("results/experiments/") and path.endswith("/README.md"):
        return path.removesuffix("README.md") + "experiment.md"  # README.md would become the index of its part
    return path if path.split("/")[0] in FOLDERS and (ROOT / path).is_file() else None


def with_site_links(text: str, page: str) -> str:
    """A page's text with its relative links as the site has them.

    Args:
        text: Markdown of the page.
        page: path of the page in the repository.

    Raises:
        ValueError: links to what does not exist, all of them in one message.
    """
    own, missing = site_path(page), []

    def moved(target: str) -> str | None:
        file, _, anchor = target.partition("#")
        if not file or re.match(r"[a-z]+:", file):
            return target
        path = os.path.normpath(os.path.join(os.path.dirname(page), file))
        if not (ROOT / path).exists():
            missing.append(target)
        there = site_path(path)
        if there is None:
            return None
        return os.path.relpath(there, os.path.dirname(own) or ".") + (f"#{anchor}" if anchor else "")

    def replaced(link: re.Match) -> str:
        if link["name"]:
            return f"[{link['name']}]: {moved(link['where']) or '#'}"
        target = moved(link["target"])
        return link["text"] if target is None else f"{link['image']}[{link['text']}]({target})"

    parts = _FENCE.split(text)  # every second one is code
    parts[::2] = [_LINK.sub(replaced, part) for part in parts[::2]]
    if missing:
        raise ValueError(f"{page}: links to what does not exist: {', '.join(missing)}")
    return "".join(parts)


def gather(target: Path = SOURCE) -> None:
    """Write all pages and files of the site to a new folder."""
    shutil.rmtree(target, ignore_errors=True)
    files = [path for folder in ("docs", *FOLDERS) for path in sorted((ROOT / folder).rglob("*")) if path.is_file()]
    files += [ROOT / name for name in PAGES if name != "README.md" and (ROOT / name).is_file()]
    for file in files:
        path = file.relative_to(ROOT).as_posix()
        if "/cells/" in path or "__pycache__" in path or path == "results/README.md":
            continue
        place = target / site_path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".md":
            place.write_text(with_site_links(file.read_text(), path))
        else:
            shutil.copyfile(file, place)


def main() -> int:
    """Gather and build; returns the exit status."""
    try:
        gather()
    except ValueError as error:
        print(f"build_site: {error}", file=sys.stderr)
        return 1
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "-f", str(ROOT / "mkdocs.yml")]
    return subprocess.run(command, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
