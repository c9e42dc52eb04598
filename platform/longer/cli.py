"""The command line of every job: all settings as flags, a YAML file, and the job's own switches."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic_settings import CliSettingsSource

from longer.config import Settings, load_settings
from longer.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}: see --help for every setting")


def parse_settings(
    description: str, argv: Sequence[str] | None = None, flags: Sequence[tuple[str, str]] = ()
) -> tuple[Settings, set[str]]:
    """Settings from the command line of a job, and which of its own boolean `flags` (name, help) were given.

    Exits with code 0 after `--help`; raises UserError for every mistake.
    """
    parser = _Parser(
        prog=Path(sys.argv[0]).stem,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; the flags below override it")
    for name, text in flags:
        parser.add_argument(f"--{name}", action="store_true", help=text)
    source: CliSettingsSource = CliSettingsSource(Settings, root_parser=parser)
    args = parser.parse_args(list(argv) if argv is not None else None)
    given = {name for name, _ in flags if getattr(args, name.replace("-", "_"))}
    overrides = source(parsed_args=args)()
    return load_settings(args.config, {k: v for k, v in overrides.items() if k in Settings.model_fields}), given
