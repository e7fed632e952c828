"""The one exception that users are meant to read: the commands print it without a traceback."""


class ImprintError(ValueError):
    """A wrong value, setting or file; the message names the value, the place and the cure."""
