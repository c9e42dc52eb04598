"""Offline runs with everything on S3: tables, model, users and candidates in, scores out."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import batch_score, export_embeddings
from longer.config import load_settings
from longer.data.parquet import read_columns
from longer.files import read_bytes, write_bytes
from longer.storage import Table
from tests.s3.test_jobs import finish, start
from tests.serving.tables import NUM_USERS, build_world, publish_requests

pytestmark = pytest.mark.ray


def test_users_and_candidates_on_s3_give_the_scores_of_a_local_disk(local_ray: None, s3: str, tmp_path: Path) -> None:
    world = build_world(tmp_path / "run")
    publish_requests(world, Table(world.path("tables", "sequences")).require("jobs.build_sequences"))
    pq.write_table(pa.table({"user_id": list(range(1, NUM_USERS + 1))}), tmp_path / "run/users.parquet")
    pq.write_table(pa.table({"item_id": ["item1", "item2"]}), tmp_path / "run/candidates.parquet")
    for file in (tmp_path / "run").rglob("*.*"):
        if file.is_file():
            write_bytes(f"{s3}/run/{file.relative_to(tmp_path / 'run')}", read_bytes(str(file)))
    found = {}
    for place, root in (("local", str(tmp_path / "run")), ("s3", f"{s3}/run")):
        chosen = world.model_dump(mode="json", exclude={"ray"}) | {"root": root}
        chosen |= {"ray": {"num_cpus": 2, "object_store_bytes": 100 << 20}}
        chosen["batch_score"] |= {"users": f"{root}/users.parquet", "candidates": f"{root}/candidates.parquet"}
        if place == "local":
            for job in (batch_score, export_embeddings):
                job.run(load_settings(overrides=chosen))
        else:
            (tmp_path / "s3.json").write_text(json.dumps(chosen))
            finish(start("batch_score,export_embeddings", str(tmp_path / "s3.json")))
        for table in ("candidate_scores", "user_vectors"):
            version = Table(f"{root}/{table}").require("jobs.batch_score")
            rows = pa.concat_tables([read_columns(file) for file in version.files()])
            found[place, table] = version.id, [file.sha256 for file in version.data_files()], rows
    for table in ("candidate_scores", "user_vectors"):
        assert found["local", table][:2] == found["s3", table][:2]
        assert len(found["s3", table][2]) == NUM_USERS
