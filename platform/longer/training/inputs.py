"""Which versions a score comes from: evaluation, batch scoring and serving are comparable when these agree."""

from dataclasses import dataclass

from longer.config import Settings
from longer.data.tables import open_version
from longer.storage import Version


@dataclass(frozen=True)
class Inputs:
    """The versions that decide every score."""

    checkpoint: Version
    sequences: Version
    requests: Version

    @staticmethod
    def served(settings: Settings, requests_table: str | None = None) -> "Inputs":
        """The checkpoint and requests that are served now, and the sequences that the requests were built from.

        The requests are the root's, or those of another table.
        """
        schema = settings.event_schema
        checkpoint = open_version(settings.path("checkpoints"), schema, None, "jobs.train")
        path = requests_table or settings.path("tables", "requests")
        requests = open_version(path, schema, None, "jobs.build_requests")
        built_from = requests.manifest["inputs"]["sequences"]
        sequences = open_version(settings.path("tables", "sequences"), schema, built_from, "jobs.build_sequences")
        return Inputs(checkpoint, sequences, requests)

    @property
    def ids(self) -> dict[str, str]:
        return {"checkpoint": self.checkpoint.id, "sequences": self.sequences.id, "requests": self.requests.id}
