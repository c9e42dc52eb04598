"""Settings files: YAML in which no key is set twice."""

from pathlib import Path
from typing import Any

import yaml

from longer.errors import UserError


class _UniqueKeys(yaml.SafeLoader):
    """YAML itself lets the last of two equal keys win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for place, (key, _) in enumerate(node.value):
            if key.value in keys[:place]:
                raise UserError(f"{key.value!r} is set twice, again at line {key.start_mark.line + 1}: keep one")
        return super().construct_mapping(node, deep)


def read_yaml(config: str) -> dict[str, Any]:
    """The settings by name. Raises UserError, one line that names the file and, where YAML tells it, the line."""
    try:
        loaded = yaml.load(Path(config).read_text(), _UniqueKeys) or {}
    except FileNotFoundError:
        raise UserError(f"{config}: no such settings file; configs/ holds ready ones") from None
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{config}: not a readable text file: name a YAML file in UTF-8") from None
    except UserError as error:
        raise UserError(f"{config}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{config}: not valid YAML{f' at line {mark.line + 1}' if mark else ''}") from None
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise UserError(f"{config}: expected a mapping of settings by name at the top level")
    return loaded
