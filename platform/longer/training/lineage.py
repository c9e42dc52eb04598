"""What a checkpoint comes from: which ones its weights go on from, and what those have trained."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from longer.progress import say
from longer.storage import Table, Version, manifest_of

_NEVER = "1970-01-01T00:00:00+00:00"
_UNKNOWN = "unknown"
"""In place of a request table's version: what a checkpoint has trained that does not say so, as one in the folder of a run."""


@dataclass(frozen=True)
class Past:
    """What weights have trained before a run starts from them.

    `until` is the time of the newest request among that, of whatever log; `is_leaking`: the run's validation may be of such
    requests. `version` names them if they are a published checkpoint.
    """

    trained: list[dict[str, Any]]
    until: str
    is_leaking: bool
    version: str | None


def past_of(start_from: str, valid_from: str) -> Past:
    """Of the checkpoint at a path, for a run that validates on requests since `valid_from`; a line if they may be seen ones."""
    manifest = manifest_of(start_from) or {}
    until = manifest.get("trained_until")
    if until is None:
        why = "does not say what it was trained on"
    elif later(until, valid_from) != valid_from:
        why = f"has trained requests until {until}, validation starts at {valid_from}"
    else:
        why = ""
    if why:
        say(
            "train",
            f"{start_from} {why}: metrics, those that choose the best epoch too, may be of requests that it has seen",
        )
    unknown = [] if until else [{"requests": _UNKNOWN, "until": _NEVER, "checkpoint": start_from}]
    return Past(manifest.get("trained", unknown), until or _NEVER, bool(why), manifest.get("version"))


def unknown_bases(checkpoint: Version) -> list[str]:
    """Checkpoints that it comes from, at any remove, of which nobody knows what they have trained."""
    return [run["checkpoint"] for run in checkpoint.manifest["trained"] if run["requests"] == _UNKNOWN]


def trained_of_log(checkpoint: Version, requests: Version) -> str:
    """Until when a checkpoint has trained requests of this log: in its last run, and in those before it on this very table."""
    *before, last = checkpoint.manifest["trained"]
    of_table = [run for run in before if manifest_of(f"{requests.table_path}/{run['requests']}")]
    return max((run["until"] for run in (*of_table, last)), key=datetime.fromisoformat)


def later(one: str, other: str) -> str:
    """Of two times in ISO format; the second of equals."""
    return one if datetime.fromisoformat(one) > datetime.fromisoformat(other) else other


def finished(table: Table, run_id: str) -> Version | None:
    """The version of a finished run, and served; a line says so.

    What is served stays if it comes from this one, by --continue or --from, at any remove: nothing that was learned since is lost
    to a repeated command. Any other is replaced: to run the command of settings is to ask for their model, also to go back to it.
    """
    served = table.current()
    ancestor = served
    while ancestor and ancestor.id != run_id:
        base = ancestor.manifest.get("continues") or ancestor.manifest.get("base")
        ancestor = table.find(base) if base else None
    if served and ancestor and ancestor.is_whole():
        stays = f"; {served.id}, which comes from it, is served" if served.id != run_id else ""
        say("train", f"run {run_id} is already finished, nothing changed{stays}")
        return ancestor
    if published := table.reuse(run_id):
        say("train", f"run {run_id} is already finished, and is served{f' in place of {served.id}' if served else ''}")
    return published
