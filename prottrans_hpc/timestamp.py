"""Times as the records of a run have them: UTC, ISO 8601, to the millisecond: as text they sort as they follow one another."""

from __future__ import annotations

import time
from datetime import UTC, datetime


def now() -> str:
    """This moment."""
    return utc(time.time())


def utc(epoch_s: float) -> str:
    """A time in seconds of the epoch."""
    return datetime.fromtimestamp(epoch_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
