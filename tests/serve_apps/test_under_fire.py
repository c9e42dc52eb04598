"""A service under load while things go wrong, or change: what is answered is right, what is not has its reason, and it recovers."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import httpx
import numpy as np
import pyarrow as pa
import pytest
from ray import serve

from longer.config import Settings
from tests.s3.proxy import Fault, Proxy, proxy_before
from tests.s3.server import running_bucket
from tests.serve_apps.services import (
    END_MS,
    NUM_CLIENTS,
    Front,
    Service,
    load,
    num_answered,
    offline_scores,
)
from tests.serving.tables import (
    NUM_USERS,
    build_world,
    checkpoint_path,
    publish_catalogue,
    publish_random_model,
    publish_sequences,
    random_events,
)

USERS = set(range(1, NUM_USERS + 1))
AFFINITY_S = 3.0
"""Within which a replica learns of another."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return build_world(tmp_path_factory.mktemp("under_fire"))


def upload_sequences(world: Settings) -> None:
    """A copy of the sequence table on S3, the pointer to its served version last."""
    root = Path(world.path("tables"))
    s3 = boto3.client("s3")
    for file in sorted((root / "sequences").rglob("*"), key=lambda file: file.name == "_CURRENT.json"):
        if file.is_file():
            s3.upload_file(str(file), "tables", str(file.relative_to(root)))


@pytest.fixture(scope="module")
def store(world: Settings) -> Iterator[Proxy]:
    """The sequence table on S3, through a proxy that can fail."""
    with pytest.MonkeyPatch.context() as patch, running_bucket(patch):
        upload_sequences(world)
        with proxy_before(os.environ["AWS_ENDPOINT_URL"]) as proxy:
            yield proxy


@pytest.fixture(scope="module")
def service(front: Front, world: Settings, store: Proxy) -> Iterator[Service]:
    keys = {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")}
    started = Service(front, world, "s3://tables/sequences", {**keys, "AWS_ENDPOINT_URL": store.url})
    try:
        started.deploy(num_replicas=1)
        yield started
    finally:
        serve.delete("scoring")


@pytest.mark.ray
@pytest.mark.parametrize("fault", [Fault(status=500), Fault(delay_s=60)], ids=["answers 500", "hangs"])
def test_users_who_are_here_are_scored_while_the_table_cannot_be_read_and_the_others_are_told(
    service: Service, store: Proxy, world: Settings, fault: Fault
) -> None:
    """Slow: what keeps silent has to do so for a while. Who asks for those who are here is as patient as a client is by default."""
    expected = offline_scores(world, checkpoint_path(world))
    for user in range(4, 10):
        httpx.delete(f"{service.url}/v1/users/{user}", timeout=30).raise_for_status()
    with load(service.url, [1, 2, 3], timeout_s=2) as undisturbed, load(service.url, [1, 2, 3]):
        undisturbed.wait_for(lambda so_far: len(so_far.latencies_ms) > 200)
    store.plan = lambda request: fault if request.method == "GET" else None
    with load(service.url, [1, 2, 3], timeout_s=2) as here, load(service.url, range(4, 10), max_retries=0) as away:
        away.wait_for(lambda so_far: so_far.refused.total() >= 3)
        num_before, began_s = away.refused.total(), time.monotonic()
        here.wait_for(lambda so_far: len(so_far.latencies_ms) > 200 and time.monotonic() > began_s + 3)
        refused_per_s = (away.refused.total() - num_before) / (time.monotonic() - began_s)
    store.plan = lambda request: None
    assert (here.refused, away.lost, away.answered) == ({}, {}, [])
    assert here.lost.total() <= undisturbed.lost.total()  # none, but where something else has the machine
    assert here.sources() == {"hit"}
    assert set(away.refused) == {
        f"{service.url}: the sequence table cannot be read at the moment: try again later (503)"
    }
    assert refused_per_s > NUM_CLIENTS  # where each waits for its own silence, there are no more
    usual_ms, ms = (np.percentile(answers.latencies_ms[NUM_CLIENTS:], 99) for answers in (undisturbed, here))
    print(f"p99 of hits: {ms:.0f} ms, undisturbed {usual_ms:.0f} ms; {refused_per_s:.0f} refused a second")
    assert ms < max(100, 3 * usual_ms)  # the machine of the tests has two cores, for the clients too
    here.assert_equal(expected)
    with load(service.url) as answers:
        answers.wait_for(lambda so_far: so_far.users() == USERS)
    assert (answers.lost, answers.refused) == ({}, {})
    answers.assert_equal(expected)


@pytest.mark.ray
def test_a_replica_that_is_killed_costs_no_wrong_answer_and_is_replaced(service: Service, world: Settings) -> None:
    service.deploy(num_replicas=2)
    service.wait_for(lambda replicas: len(replicas) == 2)
    with load(service.url) as answers, load(service.url, together=True) as batches:
        before = service.wait_for(lambda replicas: sum(map(num_answered, replicas.values())) > 50)
        victim = max(before.values(), key=num_answered)  # the load is on it
        os.kill(victim["process_id"], signal.SIGKILL)
        num_before = len(answers.answered)
        after = service.wait_for(lambda replicas: len(replicas) == 2 and victim["replica"] not in replicas)
        answers.wait_for(lambda so_far: {user for user, _ in so_far.answered[num_before:]} == USERS)
    assert len(after.keys() & before.keys()) == 1
    assert 0 < answers.num_direct < len(answers.answered)  # both ways
    for told in (answers, batches):
        print(len(told.answered), told.refused, told.lost)
        told.assert_equal(offline_scores(world, checkpoint_path(world)))
        assert (told.lost, told.refused) == ({}, {})  # the client has asked again


@pytest.mark.ray
def test_replicas_come_and_go_without_a_request_lost(service: Service, world: Settings) -> None:
    service.deploy(num_replicas=1)
    [first] = service.wait_for(lambda replicas: len(replicas) == 1)
    with load(service.url) as answers, load(service.url, together=True) as batches:
        service.deploy(num_replicas=3)
        three = service.wait_for(lambda replicas: len(replicas) == 3 and sum(map(num_answered, replicas.values())) > 50)
        assert first in three
        others = service.wait_for(
            lambda replicas: any(num_answered(replicas[one]) for one in replicas.keys() - {first})
        )
        assert others.keys() == three.keys()  # they came, and have answered
        time.sleep(AFFINITY_S)
        service.deploy(num_replicas=1)
        service.wait_for(lambda replicas: len(replicas) == 1)
        num_before = len(answers.answered)
        answers.wait_for(lambda so_far: {user for user, _ in so_far.answered[num_before:]} == USERS)
    assert 0 < answers.num_direct < len(answers.answered)  # both ways
    for told in (answers, batches):
        print(len(told.answered), told.refused, told.lost)
        assert (told.lost, told.refused) == ({}, {})
        told.assert_equal(offline_scores(world, checkpoint_path(world)))


@pytest.mark.ray
def test_models_roll_and_roll_back_without_a_request_lost_and_a_broken_one_is_refused(
    service: Service, world: Settings, tmp_path: Path
) -> None:
    first_path, second_path = checkpoint_path(world), publish_random_model(world, seed=1).path
    broken_path = str(tmp_path / "broken")
    shutil.copytree(second_path, broken_path)
    weights = Path(broken_path, "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    expected = offline_scores(world, first_path, second_path)
    first, second = dict.fromkeys(version for version, _ in expected)
    assert min(np.abs(expected[first, user] - expected[second, user]).max() for user in USERS) > 1e-4

    def wait_for(model: str, is_refused: bool) -> set[str]:
        def is_so(replicas: dict) -> bool:
            told = {(one["model_version"], one["refused_rollout"]) for one in replicas.values()}
            return len(replicas) == 2 and told == {(model, is_refused)}

        return set(service.wait_for(is_so))

    service.deploy(num_replicas=2)
    replicas = wait_for(first, False)
    with load(service.url) as answers:
        service.deploy(2, second_path)
        wait_for(second, False)
        service.deploy(2, broken_path)
        assert wait_for(second, True) == replicas
        victim = min(replicas)
        os.kill(service.replicas()[victim]["process_id"], signal.SIGKILL)
        service.wait_for(lambda alive: victim not in alive)
        replicas = wait_for(second, True)  # the one that came starts with what the other serves
        assert victim not in replicas
        service.deploy(2)  # without user_config
        assert wait_for(first, False) == replicas
    assert (answers.lost, answers.refused) == ({}, {})
    assert 0 < answers.num_direct < len(answers.answered)
    answers.assert_equal(expected)
    seen = {(answer["model_version"], answer["user_state"]["source"]) for _, answer in answers.answered}
    assert seen >= {(version, source) for version in (first, second) for source in ("load", "hit")}


@pytest.mark.ray
def test_a_newer_table_is_read_under_load_and_states_are_appended_to_it(service: Service, world: Settings) -> None:
    checkpoint, events = checkpoint_path(world), random_events(world.event_schema, seed=0)
    before = offline_scores(world, checkpoint)
    [version] = {version for version, _ in before}
    service.deploy(1, checkpoint)
    service.wait_for(lambda replicas: [one["model_version"] for one in replicas.values()] == [version])
    new = events.filter(pa.compute.equal(events["item_id"], "item1")).slice(0, 1)
    new = pa.concat_tables([new.set_column(0, "user_id", pa.array([user])) for user in sorted(USERS)])
    at = events.schema.get_field_index("event_ts")
    new = new.set_column(
        at, events.schema.field(at), pa.array([END_MS - 1] * NUM_USERS).cast(events.schema.field(at).type)
    )
    with load(service.url) as answers:
        answers.wait_for(lambda so_far: so_far.users() == USERS)
        newer = publish_sequences(world, pa.concat_tables([events, new]))
        publish_catalogue(world, newer)
        upload_sequences(world)
        service.wait_for(lambda replicas: {one["sequences_version"] for one in replicas.values()} == {newer.id})
        num_before = len(answers.answered)
        answers.wait_for(lambda so_far: {user for user, _ in so_far.answered[num_before + NUM_CLIENTS :]} == USERS)
    assert (answers.lost, answers.refused) == ({}, {})
    after = offline_scores(world, checkpoint)
    assert min(np.abs(before[key] - after[key]).max() for key in after) > 1e-4
    for user, answer in answers.answered:
        num_events = answer["user_state"]["num_events"]
        wanted = {user * user: before, user * user + 1: after}[num_events]
        np.testing.assert_allclose(answer["scores"]["label"], wanted[answer["model_version"], user], rtol=0, atol=1e-5)
    newest = answers.answered[num_before + NUM_CLIENTS :]
    assert {answer["user_state"]["num_events"] - user * user for user, answer in newest} == {1}
    assert {answer["user_state"]["source"] for _, answer in newest} <= {"append", "hit"}
