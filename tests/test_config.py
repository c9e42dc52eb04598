"""Settings: every mistake is one line that names the field and the remedy."""

import re
from pathlib import Path

import pytest

from jobs import batch_score, export_embeddings
from longer.cli import parse_settings
from longer.config import Settings, load_settings
from longer.errors import UserError

ROOT = Path(__file__).parents[1]

MISTAKES = {
    "--train.learning_rat 1": ("--train.learning_rat", "did you mean --train.learning_rate?", "--help"),
    "--trian.epochs 1": ("--trian.epochs", "did you mean --train.epochs?"),
    "--train-epochs 1": ("--train-epochs", "did you mean --train.epochs?"),
    "--train.lr 1": ("unrecognized arguments: --train.lr 1: see --help",),
    "--train.learning_rate fast": ("train.learning_rate", "number", "'fast'"),
    "--train.learning_rate -1": ("train.learning_rate", "greater than 0"),
    "--model.history_events 1000": ("history_events=1000", "multiple of the stride", "use 896"),
    "--model.query_groups 48": ("query_groups=48", "multiple of stride_groups=32"),
    "--model.history_events 128": ("query_groups=64", "exceeds the window's 32 groups"),
    "--model.num_heads 3": ("merge_size*event_width=64", "num_heads=3"),
    "--sequences.keep_events 100": ("sequences.keep_events=100", "1152", "raise keep_events"),
    '--train.tasks [{"name":"click"}]': ("train.tasks", "click", "add the label column"),
    "--config nowhere.yaml": ("nowhere.yaml", "no such settings file"),
    "--config configs": ("configs", "not a readable text file"),
    "--model.count_events [-50]": ("model.count_events.0", "greater than 0"),
    "--evaluate.length_edges [100,10]": ("length_edges=(100, 10)", "do not ascend"),
    "--train.learning_rate inf": ("train.learning_rate", "finite"),
    '--train.tasks [{"name":"label"},{"name":"label"}]': ("names a task twice",),
    "--root ": ("root", "at least 1 character"),
    "--import_events.time_unit s": ("import_events", "dataset: generic", "complete_journey importer knows its own"),
    "--batch_score.catalogue": ("catalogue without top_k", "set top_k"),
    "--batch_score.users some.parquet": ("users is for users' scores", "add candidates or catalogue"),
    "--batch_score.top_k 5": ("top_k is for users' scores", "add candidates or catalogue"),
    "--batch_score.concurrency [3,2]": ("concurrency=(3, 2)", "swap them"),
    "--batch_score.precision bf16": ("precision=bf16 is for GPUs", "set num_gpus_per_scorer"),
    "--batch_score.num_gpus_per_scorer 2": ("num_gpus_per_scorer=2", "raise concurrency"),
    "--export_embeddings.request_ts 2025-01-01": ("export_embeddings.request_ts", "timezone"),
    "--import_events.dataset taobao": ("import_events", "source is not given", "files of taobao"),
}
GENERIC_MISTAKES = {
    '{"sku": "item"}': ("import_events.columns.sku", "event_schema has no such column"),
    '{"user_id": "id", "item_id": "id"}': ("the file's column 'id' would be both 'user_id' and 'item_id'",),
    '{"item_id": "user_id"}': ("the file's column 'user_id' would be both",),
    '{"item_id": null}': ("import_events.columns.item_id is null", "only a feature can be", "name the file's column"),
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do(arguments: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_settings("a job", arguments.split(" ", 1))
    assert "\n" not in str(caught.value)
    for part in MISTAKES[arguments]:
        assert part in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("encoding", "paper"), ("queries", "uniform"), ("queries", "learnable")])
def test_a_switch_of_longer_that_another_encoder_would_ignore_is_refused(name: str, value: str) -> None:
    chosen = ["--model.merge_size", "1", "--model.encoder", '{"kind": "din"}', f"--model.{name}", value]
    with pytest.raises(UserError, match=f"{name}={value}: encoder din has no such switch: leave {name} out"):
        parse_settings("a job", chosen)


@pytest.mark.parametrize("encoder", ["none", "sum_pooling", "din", "twin"])
def test_dropout_that_an_encoder_would_ignore_is_refused(encoder: str) -> None:
    chosen = ["--model.merge_size", "1", "--model.encoder", f'{{"kind": "{encoder}"}}', "--model.dropout"]
    parse_settings("a job", [*chosen, "0"])
    with pytest.raises(
        UserError, match=f"dropout=0.1: encoder {encoder} has no layer .* leave dropout out or set"
    ) as told:
        parse_settings("a job", [*chosen, "0.1"])
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("columns", GENERIC_MISTAKES)
def test_a_mapping_that_cannot_be_meant_is_one_line(columns: str) -> None:
    chosen = ["--import_events.dataset", "generic", "--import_events.source", "log", "--import_events.columns", columns]
    with pytest.raises(UserError) as caught:
        parse_settings("a job", chosen)
    assert "\n" not in str(caught.value)
    for part in GENERIC_MISTAKES[columns]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "line"),
    {
        "--catalogue": "FILE, --catalogue: batch_score: catalogue without top_k .*: set top_k \\(--top-k\\)",
        "--top-k 5": "FILE, --top-k: batch_score: top_k is for .*, or drop it \\(--candidates, --catalogue\\)",
        "--requests-table R --candidates C": (
            "FILE, --requests-table, --candidates: batch_score: requests_table has .*, or candidates and catalogue"
        ),
        "--top-k 0": "--top-k: batch_score.top_k: Input .* \\(got '0'\\)",
        "--train.learning_rate -1": "--train.learning_rate: Input should be greater than 0 .*",
        "--sequences.keep_events 100": "FILE, --sequences.keep_events: sequences.keep_events=100 is less .*",
        '--import_events.source log --import_events.dataset generic --import_events.columns {"item_id":null}': (
            "FILE, --import_events.columns: import_events.columns.item_id is null: .*"
        ),
        "--train.epochs 2": "FILE: serve.port: Input should be .*",
        "--batch_score.check_requests 2 --catalogue --top-k 2": "FILE: serve.port: Input should be .*",
    }.items(),
)
def test_a_mistake_on_the_command_line_names_the_flag_and_one_in_the_file_does_not(
    tmp_path: Path, arguments: str, line: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("serve: {port: 0}\n" if "serve.port" in line else "seed: 1\n")
    with pytest.raises(UserError) as caught:
        parse_settings("a job", ["--config", str(file), *arguments.split()], short=batch_score.SHORT)
    assert re.fullmatch(line.replace("FILE", re.escape(str(file))), str(caught.value)), caught.value


def test_a_key_that_a_file_sets_twice_is_named_with_its_line(tmp_path: Path) -> None:
    """YAML would let the last one win: two columns mapped to one name would be a silent choice."""
    file = tmp_path / "mine.yaml"
    file.write_text("import_events:\n  columns:\n    item_id: sku\n    item_id: product\n")
    with pytest.raises(UserError, match=r"mine.yaml: 'item_id' is set twice, again at line 4"):
        load_settings(str(file))


def test_an_unknown_setting_in_a_file_names_file_and_field(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {learning_rat: 0.1, lr: 0.1, tasks: [{nam: x}]}\nmodel: [1]\nimport_event: {}\n")
    with pytest.raises(UserError) as caught:
        load_settings(str(file))
    lines = str(caught.value).splitlines()
    see = "see --help train"
    assert f"{file}: train.learning_rat: unknown setting: did you mean train.learning_rate? {see}" in lines
    assert f"{file}: train.lr: unknown setting: {see}" in lines
    assert f"{file}: train.tasks.0.nam: unknown setting: {see}" in lines
    assert f"{file}: import_event: unknown setting: did you mean import_events? see --help" in lines
    assert any(line.startswith(f"{file}: model:") for line in lines)
    file.write_text("train: {oops\n")
    with pytest.raises(UserError, match=r"mine.yaml: not valid YAML at line 2"):
        load_settings(str(file))


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 7\ntrain: {epochs: 3, learning_rate: 0.5}\n")
    settings, flags = parse_settings(
        "a job",
        ["--config", str(file), "--train.epochs", "4", "--fresh", "--from", "there"],
        [("fresh", "x"), ("from", "x", "PATH"), ("to", "x", "PATH"), ("dry-run", "x")],
    )
    assert (settings.seed, settings.train.epochs, settings.train.learning_rate) == (7, 4, 0.5)
    assert settings.train.clip_norm == Settings().train.clip_norm
    assert flags == {"fresh": True, "from": "there", "to": None, "dry-run": False}


def test_what_is_asked_offline_needs_no_section_before_it() -> None:
    """Short flags are the settings, checked as such."""
    told = ["--users", "s3://here/u", "--candidates", "s3://here/c"], ["--catalogue", "--top-k", "100"]
    lists, best = (parse_settings("a job", argv, short=batch_score.SHORT)[0].batch_score for argv in told)
    assert (lists.users, lists.candidates) == ("s3://here/u", "s3://here/c")
    assert (best.catalogue, best.top_k) == (True, 100)
    vectors, _ = parse_settings("a job", told[0][:2], short=export_embeddings.SHORT)
    assert (vectors.export_embeddings.users, vectors.batch_score.users) == ("s3://here/u", None)
    with pytest.raises(UserError, match=r"batch_score: .*catalogue without top_k"):
        parse_settings("a job", ["--catalogue"], short=batch_score.SHORT)
    with pytest.raises(UserError, match=r"--top_k 5: did you mean --top-k\?"):
        parse_settings("a job", ["--top_k", "5"], short=batch_score.SHORT)
    with pytest.raises(UserError, match="unrecognized arguments: --users"):
        parse_settings("a job", told[0])


def test_help_fits_a_screen_and_shows_one_section_where_it_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for argv in (["--help"], ["--help", "model"], ["-h", "model.encoder"], ["--users", "x", "--help"]):
        with pytest.raises(SystemExit) as caught:
            parse_settings("a job", argv, [("fresh", "starts anew")], short=batch_score.SHORT)
        assert caught.value.code == 0
        shown.append(capsys.readouterr().out)
    overview, model, encoder, again = shown
    assert again == overview
    assert len(overview.splitlines()) < 50
    assert "starts anew" in overview
    assert set(Settings.model_fields) - {"root", "seed"} <= set(re.findall(r"^  (\w+) ", overview, re.MULTILINE))
    assert "--model.merge_size" in model
    assert encoder in model
    assert "--train." not in model
    with pytest.raises(UserError, match=r"--help modle: no such section: did you mean model\? see --help"):
        parse_settings("a job", ["--help", "modle"])


def test_help_documents_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_settings("a job", ["--help", "all"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, section in Settings.model_fields.items():
        fields = getattr(section.annotation, "model_fields", {})
        for field, info in fields.items():
            assert info.description, f"{name}.{field} has no description"
            assert f" --{name}.{field} " in text or f" --{name}.{field}, --no-{name}.{field} " in text
    assert "(default: 0.002)" in text


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda file: file.name)
def test_every_settings_file_here_is_valid(file: Path) -> None:
    load_settings(str(file))


@pytest.mark.parametrize(("given", "meant"), [("2", 2), ("[1,3]", (1, 3)), ("1,3", (1, 3))])
def test_workers_on_the_command_line_are_a_number_or_a_range(given: str, meant: object) -> None:
    settings, _ = parse_settings("a job", ["--train.num_workers", given])
    assert settings.train.num_workers == meant
