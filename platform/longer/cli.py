"""The command line of every job: all settings as flags, a YAML file, and the job's own switches."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic_settings import CliSettingsSource, SettingsError

from longer.config import Settings, load_settings, see_help
from longer.errors import UserError, meant, one_line

_CUT_OFF = re.compile(r"^Parsing error encountered for ([\w.]+):")
_UNKNOWN = re.compile(r"unrecognized arguments: (--[\w.-]+)")


_OPTIONS = " options"
"""Behind a section's name in its title, as pydantic-settings has it."""
_ALL = "all"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        unknown = _UNKNOWN.match(message)
        guess = meant(unknown[1], self._option_string_actions) if unknown else ""
        raise UserError(f"{message}: {guess}{see_help(unknown[1].lstrip('-') if unknown else '')}")

    def help_of(self, section: str | None) -> str:
        """All settings of a section, of all of them, or without one what is the job's own and which sections there are."""
        own, *groups = [group for group in self._action_groups if group._group_actions]
        sections = {str(group.title).removesuffix(_OPTIONS): group for group in groups}
        if section not in (None, _ALL, *sections):
            raise UserError(f"--help {section}: no such section: {meant(str(section), sections)}see --help")
        shown = [group for name, group in sections.items() if section == _ALL or f"{name}.".startswith(f"{section}.")]
        formatter = self._get_formatter()
        if section in (None, _ALL):
            formatter.add_usage(self.usage, [], [])
            formatter.add_text(self.description)
            shown = [own, *shown]
        for group in shown:
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        if section is None:
            lines = [f"  {name:<20} {group.description or ''}".rstrip() for name, group in sections.items()]
            formatter.add_text("\n".join(["sections of settings, each shown by --help SECTION:", *lines]))
        return formatter.format_help()


class _Help(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, _: Any, section: Any, option: str | None = None) -> None:
        assert isinstance(parser, _Parser)
        print(parser.help_of(section), end="")
        parser.exit()


def parse_settings(
    description: str,
    argv: Sequence[str] | None = None,
    flags: Sequence[tuple[str, ...]] = (),
    short: Sequence[str] = (),
) -> tuple[Settings, dict[str, Any]]:
    """Settings from the command line of a job, and the values of its own `flags`, (name, help) or (name, help, metavar).

    One without a metavar is True or False; one with it is what was given, or None. Settings that are named in `short` may be given
    without their section too: `batch_score.top_k` as `--top-k`.

    Exits with code 0 after `--help`; raises UserError for every mistake.
    """
    shortcuts = {setting: setting.rpartition(".")[2].replace("_", "-") for setting in short}
    own = "".join(f" [--{name}{''.join(f' {word}' for word in metavar)}]" for name, _, *metavar in flags)
    own += "".join(f" [--{name} ...]" for name in shortcuts.values())
    parser = _Parser(
        usage=f"python -m jobs.{Path(sys.argv[0]).stem} [--config FILE]{own} [--SECTION.FIELD VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    what = f"show this and exit; SECTION: the settings of one, or of '{_ALL}'"
    parser.add_argument("-h", "--help", action=_Help, nargs="?", metavar="SECTION", help=what)
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; the flags below override it")
    for name, text, *metavar in flags:
        how: dict[str, Any] = {"metavar": metavar[0]} if metavar else {"action": "store_true"}
        parser.add_argument(f"--{name}", help=text, **how)
    source: CliSettingsSource = CliSettingsSource(Settings, root_parser=parser, cli_shortcuts=shortcuts)
    args = parser.parse_args(list(argv) if argv is not None else None)
    given = {name: getattr(args, name.replace("-", "_")) for name, *_ in flags}
    try:
        overrides = source(parsed_args=args)()
    except SettingsError as error:
        raise UserError(_not_json(args, error)) from None
    chosen = {name: value for name, value in overrides.items() if name in Settings.model_fields}
    return load_settings(args.config, chosen, shortcuts), given


def _not_json(args: argparse.Namespace, error: SettingsError) -> str:
    """Of a flag whose value is of several parts: of one cut off pydantic-settings has the name, and of others the value."""
    unread = getattr(error.__cause__, "doc", None)
    cut_off = _CUT_OFF.search(str(error))
    for flag, given in vars(args).items():
        values = given if isinstance(given, list) else [given]
        if (flag == cut_off[1]) if cut_off else (unread is not None and unread in values):
            return (
                f"--{flag} {' '.join(values)}: not valid JSON, as which lists and objects are given here: '[2, 8]', "
                '\'{"user_id": "customer"}\'; or set it in a --config file, which is YAML'
            )
    return one_line(error)
