"""The two kinds of failure that a user can mend; commands print them as one line each."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave (a file, a name, a folder) is wrong; the message says so."""


class ConfigError(UserError):
    """A mistake in a configuration; the message holds one line per mistake."""
