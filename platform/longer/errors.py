"""The one exception for what a user can put right."""


class UserError(Exception):
    """A mistake of the user's: one line that names the file, field or row and the remedy.

    Jobs print the line and exit with code 2; the service answers 4xx with it. Anything else is a bug and keeps its traceback.
    """
