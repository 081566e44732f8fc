"""What a run measures and uses: a local record always, Weights & Biases and trackio on request."""

from lkd.tracking.record import read_log
from lkd.tracking.tracker import Tracker

__all__ = ["Tracker", "read_log"]
