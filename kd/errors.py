"""The two kinds of failure that a user can mend; commands print them as one line each."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """Something the user gave (a file, a name, a folder) is wrong; the message says so."""


class ConfigError(UserError):
    """A mistake in a configuration; the message holds one line per mistake."""


def raise_first(mistakes: Sequence[str]) -> None:
    """Raise the first five mistakes as one UserError, if there are any."""
    if mistakes:
        more = f"\n... and {len(mistakes) - 5} more" if len(mistakes) > 5 else ""
        raise UserError("\n".join(mistakes[:5]) + more)


def at_least(what: str, **limits: tuple[float, float]) -> None:
    """Refuse an option below its least value.

    Args:
        what: Whose options they are, for the message.
        limits: Option to its value and the least one.

    Raises:
        UserError: The first option below its limit.
    """
    for option, (value, least) in limits.items():
        if value < least:
            raise UserError(f"{what}: {option} must be at least {least}, got {value}")
