"""Errors that the user can mend; commands print them as one line each."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """A wrong input, such as a file, a name or an option."""


class ConfigError(UserError):
    """Mistakes in a configuration, one per line."""


def raise_first(mistakes: Sequence[str]) -> None:
    """Raise the first five mistakes as one UserError, if there are any."""
    if mistakes:
        more = f"\n... and {len(mistakes) - 5} more" if len(mistakes) > 5 else ""
        raise UserError("\n".join(mistakes[:5]) + more)


def at_least(what: str, **limits: tuple[float, float]) -> None:
    """Raise a `UserError` for the first option whose value is below its minimum.

    `limits` maps options to (value, minimum); `what` names their command or function.
    """
    for option, (value, least) in limits.items():
        if value < least:
            raise UserError(f"{what}: {option} must be at least {least}, got {value}")
