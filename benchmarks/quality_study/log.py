"""A log of the study in memory. R requests."""

from dataclasses import dataclass

from longer.arrays import Histories, Int64
from longer.data.batches import Requests
from longer.schema import EventSchema
from longer.training.loader import SplitData
from longer.windows import WindowRule


@dataclass(frozen=True)
class Log:
    """All users' whole histories, and the requests of each split."""

    name: str
    schema: EventSchema
    histories: Histories
    requests: dict[str, Requests]
    row_R: dict[str, Int64]
    valid_from_ms: int
    """Where training ends."""

    def split(self, name: str, windows: WindowRule) -> SplitData:
        return SplitData(self.histories, self.requests[name], self.row_R[name], windows)
