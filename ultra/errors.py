"""The base of every error that is the user's to mend."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: a config, a path, an argument. The CLI prints it without a traceback and exits with 2.

    The text says what is wrong, where, what is allowed and what to do.
    """
