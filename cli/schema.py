"""`cachetune schema`: the JSON Schema of a file that users write or keep."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer


class DocumentName(StrEnum):
    """Files with a schema."""

    workload = "workload"
    plan = "plan"
    profile = "profile"


def command(name: Annotated[DocumentName, typer.Argument(help="Which file.")]) -> None:
    """Print the JSON Schema of a workload, plan or profile file."""
    from ..core.hardware import HardwareProfile
    from ..core.plan import TunedPlan
    from ..core.record import Document
    from ..core.workload import Workload

    kinds: dict[str, type[Document]] = {
        kind.document: kind for kind in (Workload, TunedPlan, HardwareProfile)
    }
    typer.echo(json.dumps(kinds[name.value].json_schema(), indent=2))
