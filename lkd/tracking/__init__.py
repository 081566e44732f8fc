"""What a run measures and uses: a local record always, Weights & Biases and trackio on request."""

from lkd.tracking.tracker import Tracker, read_log

__all__ = ["Tracker", "read_log"]
