"""Two arms of a comparison under the same seeds, for the examples that train with gates and without."""

import math
from collections.abc import Sequence
from typing import Any

from cmpe_se.commands.compare.statistics import compare_paired, summarise

ARMS = ("plain", "converted")


def compare_arms(records: Sequence[dict[str, Any]], metric: str) -> dict[str, dict[str, Any]]:
    """Mean and interval of each arm and of the paired difference over the seeds; None where there is no such number.

    Args:
        records: of the runs, with their ``arm``, in the order of the seeds.
        metric: name of what is compared in a record.
    """
    values = {arm: [record[metric] for record in records if record["arm"] == arm] for arm in ARMS}
    found = {arm: summarise(values[arm]) for arm in ARMS}
    found |= {"difference": compare_paired(values["converted"], values["plain"])}
    return {
        name: {key: value if math.isfinite(value) else None for key, value in vars(each).items()}
        for name, each in found.items()
    }
