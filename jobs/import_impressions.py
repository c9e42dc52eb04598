"""Imports a log of impressions: python -m jobs.import_impressions --config my.yaml [--since-last]

After jobs.build_sequences, in whose buckets users' impressions are put; jobs.build_requests then makes requests of them.
"""

from jobs import build_sequences, import_events
from longer.config import Settings
from longer.data.tables import SequenceTable
from longer.errors import UserError
from longer.runner import run_job
from longer.storage import Table, Version


def run(settings: Settings, since_last: bool = False) -> Version:
    """The impressions of the settings' log, checked as events are, one row a user; all below `impressions/` of the root.

    With `since_last`, the last version with the files added that have come since.
    """
    if settings.import_impressions.source is None:
        raise UserError("import_impressions.source is not given: name the log of impressions")
    histories = SequenceTable(settings.path("tables", "sequences"), settings.event_schema)
    about = settings.of_impressions(histories.num_buckets)
    import_events.run(about, since_last)
    table = Table(about.path("tables", "sequences"))
    return build_sequences.build(about, table, table.current() if since_last else None)


if __name__ == "__main__":
    run_job(__doc__, run, flags=(("since-last", "read only files that the last version does not hold"),))
