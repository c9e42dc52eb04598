"""A synthetic event log: any number of users and events, each event a pure function of the seed and its number.

The rule, exactly. Event n of N arrives on day n*D//N of D days, in the order of n, at the time of day that an hourly rhythm
gives to its place in the day; it happened up to `max_delay_s` earlier. A file holds what arrived on its day, so its rows are
not in the order of time, and the first ones after midnight may belong to the day before.

Its user, rank r of U, is drawn by a Zipf law: a density of x^-exponent on [1, U + 1), rank r being the unit from r to r + 1. Past
the first ranks that is Zipf's sum, which gives those more (user 1 of 100 at 0.8: 0.123, here 0.098). A day is the
(day % period_days // episode_days)-th episode of its period, and each user has one item cluster an episode, the same in every
period, drawn evenly and independently. Then

- with probability `long_range_share` the item is of the user's cluster of the episode, by a Zipf law within the cluster;
- else it is any item, by a Zipf law over all of them.

So at the start of an episode nothing recent and nothing popular tells the user's cluster: only what she did one whole period
before. Ids are ranks from 1: user 1 is the most active, item 1 the most popular. Item i is in cluster (i - 1) % num_clusters,
which `category` names, if the schema has that feature.

N events of the slice
"""

from dataclasses import dataclass
from datetime import date
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from longer.arrays import MS_PER_DAY, MS_PER_HOUR, Int64
from longer.errors import UserError
from longer.hashing import hash_int64
from longer.schema import TIMESTAMP, EventSchema
from longer.table_settings import GenerateSettings

PROVENANCE = "Generated: longer.datasets.generator. Nobody's behaviour, planted interests included."
_NEARLY_ONE = 1e-6

_ACTIONS = ("view", "click", "purchase")
_ACTION_SHARES = (0.85, 0.12, 0.03)
_HOURLY_WEIGHTS = (4, 2, 1, 1, 1, 2, 4, 7, 9, 10, 10, 11, 12, 11, 10, 10, 11, 13, 16, 19, 20, 18, 13, 8)
_USER, _IS_LONG_RANGE, _ITEM, _DELAY, _ACTION, _CLUSTER = range(6)
"""Streams: each draws its own numbers for the same event."""


@dataclass(frozen=True)
class Chunk:
    """The events of one file: numbers [first, end), all arriving on one day of the log."""

    day: int
    part: int
    first: int
    end: int


def chunks(settings: GenerateSettings) -> list[Chunk]:
    """All files of the log, in order: one a day, or several of `events_per_file` at most."""
    bounds = [first_event(settings, day) for day in range(settings.num_days + 1)]
    return [
        Chunk(day, part, first, min(first + settings.events_per_file, end))
        for day, (start, end) in enumerate(pairwise(bounds))
        for part, first in enumerate(range(start, end, settings.events_per_file))
    ]


def first_event(settings: GenerateSettings, day: int) -> int:
    """Number of the first event that arrives on this day."""
    return -(-day * settings.num_events // settings.num_days)


def check_schema(schema: EventSchema) -> None:
    """UserError where the log cannot have the schema's columns."""
    unknown = [f.name for f in schema.features if (f.name, f.kind, f.of) != ("category", "categorical", "item")]
    unknown += [schema.group_id] if schema.group_id else []
    if unknown:
        raise UserError(
            f"event_schema: the generated log has no column {unknown[0]!r}: drop it; the one feature it can have is "
            "{name: category, kind: categorical, of: item}"
        )
    if (schema.user_id, schema.item_id) != ("int64", "int64"):
        raise UserError("event_schema: ids of the generated log are int64: set user_id and item_id to int64")


def generate(settings: GenerateSettings, seed: int, schema: EventSchema, day: int, first: int, end: int) -> pa.Table:
    """Events [first, end) of a day in the schema's columns; whichever way the log is cut, the rows are the same."""
    number_N = np.arange(first, end)
    user_N = _zipf(_uniform(seed, _USER, number_N), settings.num_users, settings.user_zipf_exponent)
    item_N = _items(settings, seed, day, number_N, user_N)
    delay_N = (_uniform(seed, _DELAY, number_N) * (settings.max_delay_s * 1000 + 1)).astype(np.int64)
    columns = {
        "user_id": pa.array(user_N + 1),
        "event_ts": pa.array(_arrival_ms(settings, day, number_N) - delay_N).cast(TIMESTAMP),
        "item_id": pa.array(item_N + 1),
        "action": _labels(_actions(_uniform(seed, _ACTION, number_N)), list(_ACTIONS)),
    }
    if schema.features:
        names = [f"cluster{cluster}" for cluster in range(settings.num_clusters)]
        columns["category"] = _labels(item_N % settings.num_clusters, names)
    wanted = schema.events_arrow()
    return pa.table([columns[name] for name in wanted.names], wanted.names)


def midnight_ms(settings: GenerateSettings, day: int) -> int:
    """When a day of the log begins (UTC)."""
    return ((settings.first_day - date(1970, 1, 1)).days + day) * MS_PER_DAY


def planted_cluster(settings: GenerateSettings, seed: int, day: int, user_N: Int64) -> Int64:
    """The cluster of each user's long-range events on this day; `user_N` counts from 0."""
    num_episodes = settings.period_days // settings.episode_days
    episode = day % settings.period_days // settings.episode_days
    return (_bits(seed, _CLUSTER, user_N * num_episodes + episode) % np.uint64(settings.num_clusters)).astype(np.int64)


def _items(settings: GenerateSettings, seed: int, day: int, number_N: Int64, user_N: Int64) -> Int64:
    draw_N = _uniform(seed, _ITEM, number_N)
    is_long_range_N = _uniform(seed, _IS_LONG_RANGE, number_N) < settings.long_range_share
    size_N = np.where(is_long_range_N, settings.num_items // settings.num_clusters, settings.num_items)
    rank_N = _zipf(draw_N, size_N, settings.item_zipf_exponent)
    cluster_N = planted_cluster(settings, seed, day, user_N)
    return np.where(is_long_range_N, rank_N * settings.num_clusters + cluster_N, rank_N)


def _arrival_ms(settings: GenerateSettings, day: int, number_N: Int64) -> Int64:
    start, end = first_event(settings, day), first_event(settings, day + 1)
    busy = np.concatenate([[0.0], np.cumsum(_HOURLY_WEIGHTS) / sum(_HOURLY_WEIGHTS)])
    place_N = (number_N - start + 0.5) / (end - start)
    return midnight_ms(settings, day) + (np.interp(place_N, busy, np.arange(25)) * MS_PER_HOUR).astype(np.int64)


def _zipf(uniform_N: npt.NDArray[np.float64], size: int | Int64, exponent: float) -> Int64:
    """Ranks in [0, size) with density (rank + 1)^-exponent: the law's integral inverted, so that no table bounds the size."""
    if abs(exponent - 1.0) < _NEARLY_ONE:  # where the power below would lose all digits
        rank_N = (size + 1.0) ** uniform_N
    else:
        power = 1.0 - exponent
        rank_N = (uniform_N * ((size + 1.0) ** power - 1.0) + 1.0) ** (1.0 / power)
    return np.minimum(rank_N.astype(np.int64) - 1, np.asarray(size) - 1)  # the last one's rounding


def _actions(uniform_N: npt.NDArray[np.float64]) -> npt.NDArray[np.int8]:
    view, click, _ = np.cumsum(_ACTION_SHARES)
    return (uniform_N >= view).astype(np.int8) + (uniform_N >= click)


def _labels(index_N: npt.NDArray, labels: list[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(index_N.astype(np.int32)), labels)


def _uniform(seed: int, stream: int, number_N: Int64) -> npt.NDArray[np.float64]:
    return (_bits(seed, stream, number_N) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _bits(seed: int, stream: int, number_N: Int64) -> npt.NDArray[np.uint64]:
    """64 random bits a number; streams start at far places of one counter."""
    start = hash_int64(hash_int64(np.array([seed])).view(np.int64) + stream).view(np.int64)
    return hash_int64(number_N + start)
