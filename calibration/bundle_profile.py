"""The step profile of a bundle: its GPU's operator tables, its model's shape, its group's link."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from ..core.errors import ProfileError
from ..simulator.expert_profile import ExpertProfile, Routing
from ..simulator.operator_tables import load_step_profile
from ..simulator.step_profile import Collective, StepProfile
from .bundles import Bundle, known_as, model_of

ROW_BYTES = 2
"""Of each value that GPUs exchange: bfloat16."""


class Shape(NamedTuple):
    """What operator tables do not say of a model."""

    n_layers: int
    hidden_size: int
    vocab_size: int
    routing: Routing | None = None


EXPERT_MODELS = {"Qwen3-30B-A3B": Shape(48, 2048, 151936, Routing(n_experts=128, n_used=8))}
"""Models with experts, from their config.json."""


def profile_of(bundle: Bundle, profiles: str | Path) -> StepProfile:
    """The step profile of a bundle's GPU, model and tensor-parallel degree.

    `profiles` is the tree `<gpu>/<model>/<variant>/tpN`, or one `tpN` folder itself.

    Raises:
        ModelError: a model whose number of layers is not known.
        ProfileError: no such folder, or a table in it that cannot be used.
    """
    shape = shape_of(bundle.model)
    folder = _folder(bundle, Path(profiles))
    profile = load_step_profile(folder, shape.n_layers, shape.routing)
    if not skew_enabled(folder):
        profile.skew = {}
    profile.capture_sizes = bundle.capture_sizes
    if bundle.tp > 1:
        # On a ring an all-reduce sends each GPU's part twice around, a gather once.
        reduced = _exchange(bundle, bundle.tp, shape.hidden_size)
        profile.all_reduce = reduced._replace(us_per_row=2 * reduced.us_per_row)
        profile.gather = _exchange(bundle, bundle.tp, shape.vocab_size)
    if isinstance(profile, ExpertProfile) and bundle.n_engines > 1:
        # A row travels with its router's logits, and comes back without.
        n_experts = profile.routing.n_experts
        profile.dispatch = _exchange(bundle, bundle.n_engines, shape.hidden_size + n_experts)
        profile.combine = _exchange(bundle, bundle.n_engines, shape.hidden_size)
    return profile


def shape_of(name: str) -> Shape:
    """The shape of a Hugging Face model: bundles hold none.

    Raises:
        ModelError: none of the known models begins its name.
    """
    if known := known_as(name, EXPERT_MODELS):
        return EXPERT_MODELS[known]
    spec = model_of(name)
    return Shape(spec.n_layers, spec.hidden_size, spec.vocab_size)


def skew_enabled(folder: Path) -> bool:
    """Whether the profile's `meta.yaml` lets its sweep of mixed contexts be used; default True."""
    meta = folder.parent / "meta.yaml"
    if not meta.exists():
        return True
    text = meta.read_text(encoding="utf-8", errors="replace")
    said = re.search(r"^skew_fit:\s*\n\s+enabled:\s*(\w+)", text, re.MULTILINE)
    return said is None or said.group(1).lower() != "false"


def _exchange(bundle: Bundle, n_gpus: int, n_values: int) -> Collective:
    """Each GPU's part of rows of `n_values` once around the ring."""
    share = (n_gpus - 1) / n_gpus
    us_per_row = share * ROW_BYTES * n_values / bundle.link_bytes_per_s * 1e6
    return Collective(bundle.link_latency_s * 1e6, us_per_row)


def _folder(bundle: Bundle, root: Path) -> Path:
    if (root / "attention.csv").exists():
        return root
    wanted = root / bundle.gpu / bundle.model
    found = sorted(wanted.glob(f"*/tp{bundle.tp}/attention.csv"))
    if not found:
        raise ProfileError(
            "the profiles must hold the bundle's GPU, model and tensor-parallel degree",
            values=f"no {wanted}/*/tp{bundle.tp}",
            remedy="give the folder that holds the GPUs' folders, or the tpN folder",
        )
    return next((f.parent for f in found if f.parts[-3] == "bf16"), found[0].parent)
