"""The ``models`` command: the networks of cmpe_se, plain and with attention, and the cost of the attention."""

import json
from typing import Any

from rich import box
from rich.table import Table

from cmpe_se.errors import UserError
from cmpe_se.layers.views import TABLE
from cmpe_se.networks.registry import PLAIN_NETWORKS, PREFIXES
from cmpe_se.networks.residual import ResidualNetwork
from cmpe_se.utils.cost import count_multiply_adds, count_parameters
from cmpe_se.utils.terminal import Terminal


def models(
    *, view: str = "folded_3x3", num_classes: int = 10, image_size: int = 32, as_json: bool = False
) -> list[dict]:
    """List our networks with their parameters and multiply-adds: plain, with SE, with a competitive view.

    Args:
        view: view of the competitive networks, in the last columns.
        num_classes: number of classes.
        image_size: side of the images in pixels.
        as_json: print JSON instead of a table.

    Returns:
        A record for each name: ``name``, ``view``, ``params``, ``macs`` (multiply-adds for one image).
    """
    if view not in TABLE:
        raise UserError(f"unknown view '{view}'; choose one of {', '.join(TABLE)}")
    if image_size < 1 or num_classes < 1:
        raise UserError(f"image_size {image_size} and num_classes {num_classes} should be at least 1")
    views = {prefix: view if prefix == "cmpe_se_" else own for prefix, own in PREFIXES.items()}
    measure = _Measure(num_classes, image_size)
    records = [
        {"name": prefix + base, "view": view_of_prefix} | measure(base, view_of_prefix)
        for base in PLAIN_NETWORKS
        for prefix, view_of_prefix in views.items()
    ]
    if as_json:
        print(json.dumps(records, indent=2))
    else:
        Terminal().print(_table(records, view, image_size))
    return records


class _Measure:
    """Parameters and multiply-adds of our networks, in a third of the time that the whole networks take.

    After a stage's first block, which may project, all of its blocks are alike. So networks of one and of two blocks a
    stage tell what any deeper one costs, exactly; networks that differ in their depth alone share them.
    """

    def __init__(self, num_classes: int, image_size: int):
        self._num_classes, self._image_size = num_classes, image_size
        self._measured: dict[str, dict[str, int]] = {}

    def __call__(self, base: str, view: str | None) -> dict[str, int]:
        network, settings = PLAIN_NETWORKS[base]
        layers = 9 if settings.get("block") == "bottleneck" else 6  # of one block in each of three stages
        blocks, others = divmod(settings["depth"], layers)
        one, two = (self._short(network, settings | {"depth": n * layers + others, "view": view}) for n in (1, 2))
        return {name: one[name] + (blocks - 1) * (two[name] - one[name]) for name in one}

    def _short(self, network: type[ResidualNetwork], settings: dict[str, Any]) -> dict[str, int]:
        key = f"{network.__name__} {settings}"
        if key not in self._measured:
            made = network(**settings, num_classes=self._num_classes, device="meta")
            macs = count_multiply_adds(made, (3, self._image_size, self._image_size))
            self._measured[key] = {"params": count_parameters(made), "macs": macs}
        return self._measured[key]


def _table(records: list[dict[str, Any]], view: str, image_size: int) -> Table:
    by_name = {record["name"]: record for record in records}
    table = Table(
        title="Parameters, and multiply-adds (M) of one image; se_ and cmpe_se_: added by the attention",
        caption=f"{image_size}x{image_size} images; cmpe_se_ with view {view}; every name takes view=",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption_justify="left",
    )
    table.add_column("name", no_wrap=True)
    for column in ("plain", "M", "se_", "M", "cmpe_se_", "M"):
        table.add_column(column, justify="right", no_wrap=True)
    for base in PLAIN_NETWORKS:
        plain = by_name[base]
        cells = [f"{plain['params']:,}", f"{plain['macs'] / 1e6:,.1f}"]
        for prefix in ("se_", "cmpe_se_"):
            record = by_name[prefix + base]
            params, macs = record["params"] - plain["params"], record["macs"] - plain["macs"]
            cells += [f"+{params:,}", f"+{macs / 1e6:,.2f}"]
        table.add_row(base, *cells)
    return table
