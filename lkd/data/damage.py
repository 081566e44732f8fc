"""Images that cannot be decoded: skipped, counted, named; too many of them end the run."""

import logging
from threading import Lock

from lkd.errors import UserError

LEAST_SEEN = 10_000  # a fraction of fewer images means little


class Damage:
    """Counts the images that were asked for and those that could not be decoded.

    Args:
        limit: Fraction of damaged images above which the run stops; of at least `LEAST_SEEN` images.

    Raises:
        UserError: If the limit is not in [0, 1].
    """

    def __init__(self, limit: float = 0.001) -> None:
        if not 0 <= limit <= 1:
            raise UserError(f"data.damaged_limit: {limit} is not in [0, 1]")
        self.limit = limit
        self.seen = 0
        self.damaged = 0
        self.named: set[str] = set()
        self.lock = Lock()

    def record(self, seen: int, failures: list[tuple[str, str]]) -> None:
        """Count images, and log each damaged one the first time.

        Args:
            seen: Images asked for, the damaged ones among them.
            failures: Name of each damaged image, and what is wrong with it.

        Raises:
            UserError: If there are more than the limit allows.
        """
        with self.lock:
            self.seen += seen
            self.damaged += len(failures)
            for name, reason in failures:
                if name not in self.named:
                    self.named.add(name)
                    logging.getLogger("lkd").warning(
                        "%s; skipped (%d damaged of %d images seen)", reason, self.damaged, self.seen
                    )
            if self.damaged > self.limit * max(self.seen, LEAST_SEEN):
                named = ", ".join(sorted(self.named)[:3]) + (", ..." if len(self.named) > 3 else "")
                raise UserError(
                    f"data: {self.damaged} of {self.seen} images seen cannot be decoded ({named}), more than "
                    f"data.damaged_limit {self.limit:g} allows: replace them, or raise the limit"
                )
