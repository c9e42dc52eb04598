"""What a checkpoint comes from: which ones its weights go on from, and what those have trained."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from longer.progress import say
from longer.storage import Table, Version, manifest_of
from longer.training.checkpoints import CheckpointInfo

_NEVER = "1970-01-01T00:00:00+00:00"
_UNKNOWN = "unknown"
"""In place of a request table's version: what a checkpoint has trained that does not say so, as one in the folder of a run."""


@dataclass(frozen=True)
class Past:
    """What weights have trained before a run starts from them.

    `until` is the time of the newest request among that, of whatever log; `is_leaking`: the run's validation may be of requests
    that they or the user tower have seen. `version` names them if they are a published checkpoint. `upstream` is what the frozen
    user tower among them has trained, as manifests have it: apart, since the model has yet to train those days.
    """

    trained: list[dict[str, Any]]
    until: str
    is_leaking: bool
    version: str | None
    upstream: dict[str, Any] | None


def past_of(start_from: str | None, tower: CheckpointInfo | None, valid_from: str) -> Past:
    """Of the checkpoint at a path, or of fresh weights around a user tower, or of fresh ones alone.

    For a run that validates on requests since `valid_from`; a line if they may be seen ones.
    """
    path = start_from or (tower.path if tower else None)
    if path is None:
        return Past([], _NEVER, is_leaking=False, version=None, upstream=None)
    unknown = {"requests": _UNKNOWN, "until": _NEVER, "checkpoint": path}
    manifest = {"trained": [unknown], "trained_until": _NEVER} | (manifest_of(path) or {})
    trained, until, is_leaking = manifest["trained"], manifest["trained_until"], may_be_seen(path, manifest, valid_from)
    if start_from:
        return Past(trained, until, is_leaking, manifest.get("version"), manifest.get("upstream"))
    assert tower
    upstream = {"checkpoint": path, "model_version": tower.model_version, "trained": trained, "trained_until": until}
    return Past([], _NEVER, is_leaking, None, upstream)


def may_be_seen(path: str, manifest: dict[str, Any], valid_from: str) -> bool:
    """Whether a checkpoint, or the user tower in it, may have trained requests since `valid_from`; lines tell why."""
    reasons = [
        f"{name} has trained requests until {past['trained_until']}, validation starts at {valid_from}"
        for name, past in pasts(path, manifest).items()
        if later(past["trained_until"], valid_from) != valid_from
    ]
    reasons += [f"{base} does not say what it was trained on" for base in unknown_bases(manifest)]
    for reason in reasons:
        say("train", f"{reason}: metrics, those that choose the best epoch too, may be of requests that it has seen")
    return bool(reasons)


def pasts(path: str, manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a checkpoint has trained, and what the user tower in it has, by what a message calls each."""
    upstream = manifest.get("upstream")
    return {path: manifest} | ({f"{upstream['checkpoint']}, the user tower of {path},": upstream} if upstream else {})


def unknown_bases(manifest: dict[str, Any]) -> list[str]:
    """Checkpoints that it or its user tower comes from, at any remove, of which nobody knows what they have trained."""
    runs = [run for past in pasts("", manifest).values() for run in past["trained"]]
    return [run["checkpoint"] for run in runs if run["requests"] == _UNKNOWN]


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
