"""What is wrong with a service's arguments is said before any replica starts, and what is left out is found."""

from pathlib import Path

import pytest
import ray
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from jobs.serve import PROXY_MARGIN_S
from longer.errors import UserError
from serve_apps.arguments import resolved
from serve_apps.scoring import ScoringArgs, build_app
from tests.serving.tables import build_world, checkpoint_path

CONFIG = Path(__file__).parents[2] / "serve_apps" / "scoring.yaml"


def test_the_config_file_is_one_that_serve_and_the_builder_accept() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    [application] = config.applications
    assert application.import_path == "serve_apps.scoring:build_app"
    assert config.http_options.host == "127.0.0.1"
    args = ScoringArgs.model_validate(application.args)
    assert config.http_options.request_timeout_s == args.timeout_s + PROXY_MARGIN_S


def test_a_misspelt_argument_is_told_with_the_one_that_was_meant() -> None:
    with pytest.raises(ValidationError, match=r"cach_bytes: unknown argument: did you mean cache_bytes\?"):
        ScoringArgs.model_validate({"checkpoint": "c", "cach_bytes": 5})


def test_a_wrong_path_is_one_line_and_exit_code_2_before_any_replica_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = build_world(tmp_path)
    with pytest.raises(SystemExit) as ended:
        build_app(ScoringArgs(checkpoint="nowhere", sequences=world.path("tables", "sequences")))
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "nowhere/model.json" in line
    assert not ray.is_initialized()  # one of its own would be in the way of whoever starts one next
    with pytest.raises(UserError, match=r"nowhere: no published version .* jobs.build_sequences"):
        resolved(ScoringArgs(checkpoint=checkpoint_path(world), sequences="nowhere"))
    with pytest.raises(UserError, match=r"nowhere: version \w+ is not in this table"):
        resolved(ScoringArgs(checkpoint=world.path("checkpoints"), items="nowhere"))


def test_tables_beside_the_checkpoints_are_found_so_that_no_candidate_loses_its_features(tmp_path: Path) -> None:
    world = build_world(tmp_path)
    for checkpoint in (world.path("checkpoints"), checkpoint_path(world)):
        found = resolved(ScoringArgs(checkpoint=checkpoint))
        assert found.checkpoint == checkpoint_path(world)
        assert found.sequences == world.path("tables", "sequences")
        assert found.items == world.path("tables", "items")
