"""Names that mean something to the places they are written to: markup, formulas, escapes, other scripts."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = (
    "a_$x^$",  # mathtext, which cannot be parsed
    "$a_b$",  # mathtext, which can
    "cost \\$5",
    "[x]",  # rich's markup
    "[bold red]loud[",
    ":cat:",  # rich's emoji
    "<img src=x onerror=document.title='broken'>",
    "&amp; 'quoted' \"twice\"",
    "${7*7} {{7*7}} {0} %s",
    "a|b`c`d",  # Markdown
    "**bold** _it_ # [link](x)",
    "=1+1",  # spreadsheets
    "+cmd",
    "@sum",
    "-1",  # a number, and no formula
    "\ttab",
    "two\nlines\r",
    "\x1b[31mred\x1b]0;title\x07",  # a terminal's commands
    "user\u202egnp.exe",  # right to left from here on
    "zero\u200bwidth",
    os.fsdecode("caf\xe9".encode("latin-1")),  # a file name that is not UTF-8
    "x, true class y",  # as a sentence of ours goes on
    "猫",
    "قطة",
    "é" * 60 + "long" * 20,
)


def write_hostile_folder(root: Path, images: int = 5) -> Path:
    """Class folders with these names, of ``images`` 8x8 files each; the files have odd names as well."""
    random = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        (root / name).mkdir(parents=True)
        for image in range(images):
            pixels = random.integers(0, 60, (8, 8, 3), dtype=np.uint8)
            pixels[number % 8, number // 8 :] += 150
            Image.fromarray(pixels).save(root / name / f"{'=[x]$' if image else '猫'}{image}.png")
    return root
