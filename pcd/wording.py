"""Numbers as a person reads them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """A time in the unit that fits: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def brief_rate(rate: float) -> str:
    """A learning rate in few letters, to three digits: 0.0001 is `1e-4`."""
    digits, _, exponent = f"{rate:.2e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}" if rate else "0"
