"""Errors a user can cause. Each says the rule, the values and the remedy on one line."""

from __future__ import annotations


class CacheTuneError(Exception):
    """A rule was broken by input; `str()` is one line: rule, values, remedy."""

    def __init__(self, rule: str, *, values: str = "", remedy: str = "") -> None:
        self.rule = rule
        self.values = values
        self.remedy = remedy
        parts = [rule]
        if values:
            parts.append(f"got {values}")
        text = ", ".join(parts)
        super().__init__(f"{text}; {remedy}" if remedy else text)


class SchemaError(CacheTuneError):
    """A file does not have the shape its schema asks for."""


class PlanError(CacheTuneError):
    """A plan breaks a rule, or does not fit this machine or model."""


class ProfileError(CacheTuneError):
    """A hardware profile is missing, old, or lacks a coefficient that is needed."""


class WorkloadError(CacheTuneError):
    """A workload is empty, contradictory or too long for the model."""


class ModelError(CacheTuneError):
    """A model family, RoPE kind or shape that is not supported."""


class StoreError(CacheTuneError):
    """The chunk store cannot read or write."""


class CapacityError(CacheTuneError):
    """Something does not fit: blocks, a tier, a disk."""


class InvariantViolation(AssertionError):
    """A numbered invariant does not hold: our bug. Prints both sides."""
