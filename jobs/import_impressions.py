"""Imports a log of impressions: python -m jobs.import_impressions --config my.yaml [--since-last]

After jobs.build_sequences, in whose buckets users' impressions are put; jobs.build_requests then makes requests of them.
"""

from jobs import build_sequences, import_events
from longer.config import Settings
from longer.data.tables import SequenceTable
from longer.errors import UserError
from longer.runner import run_job, user_error_in
from longer.storage import Table, Version


def run(settings: Settings, since_last: bool = False) -> Version:
    """The impressions of the settings' log, checked as events are, one row a user; all below `impressions/` of the root.

    With `since_last`, the last version with the files added that have come since.
    """
    if settings.import_impressions.source is None:
        raise UserError("import_impressions.source is not given: name the log of impressions")
    histories = SequenceTable(settings.path("tables", "sequences"), settings.event_schema)
    about = settings.of_impressions(histories.num_buckets)
    try:
        import_events.run(about, since_last)
    except Exception as error:
        if mistake := user_error_in(error):  # the importer knows its settings by the name that they have for events
            raise UserError(str(mistake).replace("import_events", "import_impressions")) from None
        raise
    table = Table(about.path("tables", "sequences"))
    return build_sequences.build(about, table, table.current() if since_last else None)


if __name__ == "__main__":
    run_job(__doc__, run, flags=(("since-last", "read only files that the last version does not hold"),))
