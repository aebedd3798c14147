"""The only place where a unit is converted."""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
NS_PER_US = 1_000
NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000


def ceil_div(a: int, b: int) -> int:
    """Smallest integer not below a / b, for b > 0."""
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    """Smallest multiple of `multiple` not below `a`."""
    return ceil_div(a, multiple) * multiple


def ns_to_ms(t_ns: float) -> float:
    """Nanoseconds as milliseconds."""
    return t_ns / NS_PER_MS


def s_to_ns(t_s: float) -> int:
    """Seconds as integer nanoseconds, rounded half to even."""
    return round(t_s * NS_PER_S)
