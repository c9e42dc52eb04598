"""What a replica takes in of those before it, without the ring."""

from collections.abc import Callable

from longer.serving.dumps import StateDumps
from longer.serving.scorer import Scorer


def restore(
    dumps: StateDumps, scorer: Scorer, is_wanted: Callable[[int | str], bool] = lambda _: True
) -> list[int | str]:
    """Ids of the users whose states were taken in, after the events that were sent to the replica."""
    listing = dumps.listed()
    revisions = {
        (dump, user_key): revision
        for dump, events in dumps.events(listing, scorer.version.schema_hash, is_wanted)
        for user_key, revision in scorer.online.restore(events).items()
    }
    taken = [
        state.user_id
        for dump, states in dumps.states(
            listing, scorer.version, scorer.cache.layout, lambda _, user_id: is_wanted(user_id)
        )
        for state in states
        if scorer.restore(state, revisions.get((dump, state.user_key)))
    ]
    dumps.done(listing)
    return taken
