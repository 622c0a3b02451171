"""Measured values as words: pure functions from a number, or from None, to what a table or chart prints."""

from __future__ import annotations

import math

__all__ = ["NOT_MEASURED", "count", "fraction", "joules", "percent", "points", "step", "three_digits", "times"]

NOT_MEASURED = "not measured"


def percent(value: float | None) -> str:
    """A fraction as per cent.

    >>> percent(0.912)
    '91.20 %'
    """
    return NOT_MEASURED if value is None else f"{100 * value:.2f} %"


def points(change: float | None) -> str:
    """A change in percentage points, with its sign.

    >>> points(-0.4)
    '-0.40 points'
    """
    if change is None:
        return NOT_MEASURED
    return f"{change:+.2f} points" if round(change, 2) else "same"


def count(value: int | None) -> str:
    """A whole number with its thousands apart.

    >>> count(1234567)
    '1,234,567'
    """
    return NOT_MEASURED if value is None else f"{value:,}"


def fraction(value: float | None) -> str:
    """A fraction to four places.

    >>> fraction(None)
    'not measured'
    """
    return NOT_MEASURED if value is None else f"{value:.4f}"


def joules(value: float | None) -> str:
    """An energy in the unit that keeps its digits short.

    >>> joules(0.0123), joules(45.6)
    ('12.3 mJ', '45.6 J')
    """
    if value is None:
        return NOT_MEASURED
    return f"{three_digits(value)} J" if value >= 1 or value == 0 else f"{three_digits(1000 * value)} mJ"


def step(before: float | None, after: float | None) -> str:
    """The difference of two fractions, with its sign.

    >>> step(0.0, 0.9)
    '+0.9000'
    """
    if before is None or after is None:
        return NOT_MEASURED
    return f"{after - before:+.4f}" if round(after - before, 4) else "same"


def times(before: float | None, after: float | None, less: str, more: str) -> str:
    """How many times less or more; equal sides are the same, and a side that is 0 has no ratio.

    >>> times(123, 10, "smaller", "larger")
    '12.3x smaller'
    >>> times(10, 12, "smaller", "larger")
    '1.20x larger'
    """
    if before is None or after is None:
        return NOT_MEASURED
    if before == after:
        return "same"
    if not before or not after:
        return "no ratio"
    ratio, word = (before / after, less) if before > after else (after / before, more)
    return f"{ratio:.2f}x {word}" if ratio < 10 else f"{ratio:,.1f}x {word}"


def three_digits(value: float) -> str:
    """Three significant digits, never with an exponent.

    >>> three_digits(0.012345), three_digits(12.345), three_digits(12345.6)
    ('0.0123', '12.3', '12,346')
    """
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:,.{min(max(digits, 0), 6)}f}"
