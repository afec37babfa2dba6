"""A training that can be watched: trackers, statistics of its gates, a page of plots, a trace of its time."""

from cmpe_se.training.watching.trackers import check_trackers
from cmpe_se.training.watching.watch import Watch

__all__ = ["Watch", "check_trackers"]
