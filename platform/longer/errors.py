"""The one exception for what a user can put right."""


class UserError(Exception):
    """A mistake of the user's: one line that names the file, field or row and the remedy.

    Jobs print the line and exit with code 2; the service answers 4xx with it. Anything else is a bug and keeps its traceback.
    """


def one_line(error: BaseException) -> str:
    """The first line of another library's message, to quote in a UserError."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class StorageError(UserError):
    """A table or file that cannot be read: one line that names it. Nobody's request is at fault, so the service answers 503."""
