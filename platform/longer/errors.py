"""The one exception for what a user can put right."""

import difflib
from collections.abc import Iterable

_ALIKE = 0.75
"""Share of letters that a name must have in common with another to be taken for a slip of the pen."""


class UserError(Exception):
    """A mistake of the user's: one line that names the file, field or row and the remedy.

    Jobs print the line and exit with code 2; the service answers 4xx with it. Anything else is a bug and keeps its traceback.
    """


def meant(name: str, known: Iterable[str]) -> str:
    """The known dotted name that is most like an unknown one, as a question to put into a UserError; nothing if none is.

    In a section that is known, only its own names are looked at: what they share with the unknown one says nothing.
    """
    names = [other for other in known if not name.startswith(f"{other}.")]
    section = name[: name.rfind(".") + 1]
    if not any(other.startswith(section) for other in names):
        section = ""
    beside = [other.removeprefix(section) for other in names if other.startswith(section)]
    like = difflib.get_close_matches(name.removeprefix(section), beside, n=1, cutoff=_ALIKE)
    return f"did you mean {section}{like[0]}? " if like else ""


def one_line(error: BaseException) -> str:
    """The first line of another library's message, to quote in a UserError."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class StorageError(UserError):
    """A table or file that cannot be read: one line that names it. Nobody's request is at fault, so the service answers 503."""
