"""`--set key=value`: knobs of a plan from the command line, checked like a plan file."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from ..core.errors import PlanError
from ..core.io_preset import io_preset
from ..core.plan import ReusePlan
from ..core.record import first_problem


def apply_settings(plan: ReusePlan, settings: Sequence[str]) -> ReusePlan:
    """`plan` with knobs changed, in order.

    A value is JSON, or a word. A dotted key reaches into a list or object
    (`rules.0.load_exact=false`); `ratio=0.2` is short for that ratio in every rule, `disk=hdd` for
    how such a disk is read best (`core/io_preset.py`).

    Raises:
        PlanError: not key=value, an unknown knob, a value the plan refuses.
    """
    data = plan.model_dump(mode="json")
    for rule in data["rules"]:
        rule.setdefault("rho", None)  # files leave it out where it is not set
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise PlanError("--set takes key=value", values=repr(setting), remedy="add the value")
        value = _value(text)
        if key == "ratio":
            for rule in data["rules"]:
                rule["ratios"] = value if isinstance(value, list) else [value]
        elif key == "disk":
            data |= io_preset(text).knobs
        else:
            _put(data, key, value)
    try:
        return ReusePlan.model_validate_json(json.dumps(data))
    except ValidationError as e:
        text, got = first_problem(e)
        raise PlanError(f"--set {text}", values=got, remedy="correct the value") from None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _put(data: Any, key: str, value: Any) -> None:
    """Set what the dotted `key` names, which must exist."""
    *path, last = key.split(".")
    place = data
    for part in path:
        place = place[_known(part, place, key)]
    place[_known(last, place, key)] = value


def _known(part: str, place: Any, key: str) -> Any:
    """`part` as a key of the object, or an index of the list, `place`."""
    names = _names(place)
    if part not in names:
        near = difflib.get_close_matches(part, [*names, "ratio", "disk"], n=1)
        remedy = f"did you mean '{near[0]}'?" if near else f"knobs here: {', '.join(names) or '-'}"
        raise PlanError("--set must name a knob of the plan", values=repr(key), remedy=remedy)
    return int(part) if isinstance(place, list) else part


def _names(place: object) -> list[str]:
    if isinstance(place, dict):
        return [str(key) for key in place]
    return [str(i) for i in range(len(place))] if isinstance(place, list) else []
