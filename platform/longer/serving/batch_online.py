"""The scores of a split against those that the serving check got over HTTP, where both have been made of the same tables."""

from typing import Any

from longer.config import Settings
from longer.data.scores import check_difference, most_difference, read_scores
from longer.data.tables import open_version
from longer.errors import UserError
from longer.storage import TABLE_FORMAT, Table, Version, fingerprint
from longer.training.checkpoints import read_info


def check_against_online(settings: Settings, scored: Version) -> Version:
    """How far the batch scores are from those that the serving check got over HTTP: a record in the manifest, next to them.

    `max_abs_diff_vs_online` is null if no request was scored by both.
    """
    online = Table(settings.path("serving_check")).current()
    if online and online.manifest["inputs"] != scored.manifest["inputs"]:
        online = None
    table = Table(settings.path("batch_scores", "check"))
    version_id = fingerprint("batch_check", TABLE_FORMAT, scored.id, online and online.id)
    if published := table.reuse(version_id):
        return published
    record: dict[str, Any] = {
        "rows": scored.manifest["num_rows"],
        "rows_per_s": scored.manifest["rows_per_s"],
        "seconds": scored.manifest["seconds"],
        "max_abs_diff_vs_online": None,
        "compared_requests": 0,
    }
    if online:
        made_by = scored.manifest["inputs"]["checkpoint"]
        tasks = read_info(
            open_version(settings.path("checkpoints"), settings.event_schema, made_by, "jobs.train").path
        ).tasks
        asked = read_scores(online)
        ours = read_scores(scored, asked["request_id"].to_numpy())
        precision = scored.manifest["settings"].get("precision", "float32")
        try:
            diff, compared = check_difference(asked, ours, tasks, most_difference(precision))
        except ArithmeticError as error:
            stays = f"{scored.path} is published all the same, and current"
            if precision == "float32":
                raise ArithmeticError(f"{error}; {stays}") from error
            raise UserError(
                f"batch_score.precision={precision}: {error}; {stays}: set float32, or, if its code was another, run serve_check "
                "again"
            ) from error
        record |= {"max_abs_diff_vs_online": diff if compared else None, "compared_requests": compared}
    about = {
        "schema_hash": settings.event_schema.hash(),
        "inputs": {"batch_scores": scored.id, "serving_check": online and online.id},
    }
    return table.publish(version_id, {**about, **record}, [])
