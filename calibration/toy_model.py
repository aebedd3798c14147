"""The small trained model that ships with the project, and the quality measured with it."""

from __future__ import annotations

from pathlib import Path

from ..core.quality import QualityProfile

TOY_FOLDER = Path(__file__).parent / "toy"
QUALITY_FILE = TOY_FOLDER / "quality.json"


def shipped_quality() -> QualityProfile:
    """Quality of every policy and ratio on the shipped model, measured by `bench quality`."""
    return QualityProfile.read(QUALITY_FILE)
