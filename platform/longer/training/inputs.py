"""Which versions a score comes from: evaluation, batch scoring and serving are comparable when these agree."""

from dataclasses import dataclass

from longer.config import Settings
from longer.data.tables import open_version
from longer.storage import Version


def served_checkpoint(settings: Settings) -> Version:
    return open_version(settings.path("checkpoints"), settings.event_schema, None, "jobs.train")


@dataclass(frozen=True)
class Inputs:
    """The versions that decide every score."""

    checkpoint: Version
    sequences: Version
    requests: Version

    @staticmethod
    def served(settings: Settings, requests: Version | None = None) -> "Inputs":
        """The checkpoint that is served now, the root's requests, or those given, and the sequences that these were built from."""
        schema = settings.event_schema
        checkpoint = served_checkpoint(settings)
        requests = requests or open_version(settings.path("tables", "requests"), schema, None, "jobs.build_requests")
        built_from = requests.manifest["inputs"]["sequences"]
        sequences = open_version(settings.path("tables", "sequences"), schema, built_from, "jobs.build_sequences")
        return Inputs(checkpoint, sequences, requests)

    @property
    def ids(self) -> dict[str, str]:
        return {"checkpoint": self.checkpoint.id, "sequences": self.sequences.id, "requests": self.requests.id}
