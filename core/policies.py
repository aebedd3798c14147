"""The policies: each decides the fate of every token, for both executors. Written once.

Sources: CacheTune 2605.24022 section 4 (offline rank, ratio per hardware), CacheBlend EuroSys'25
(deviation at a check layer), EPIC ICML'25 (first k tokens of each chunk).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .chunk_index import ChunkEntry
from .decision import ChunkFate, ReuseDecision
from .plan import RatioRule, ReusePlan

Found = Sequence[ChunkEntry | None]
CountRecomputed = Callable[[int, RatioRule], tuple[int, ...]]

CHECK_LAYER = 1
"""CacheBlend runs the layers below it in full and compares K at it (LMCache does the same)."""

ORDER_OF_POLICY = {"epic": "chunk_start"}


def order_of(plan: ReusePlan) -> str:
    """Name of the stored token order a plan needs: its selector, or the one its policy implies."""
    return ORDER_OF_POLICY.get(plan.policy, plan.selector)


@dataclass(frozen=True, slots=True)
class Backlog:
    """What else there is to do when a prompt gets its place."""

    n_ahead: int = 0
    """Rows of prompts under way that are not computed yet."""
    n_behind: int = 0
    """Prompts that wait for a place."""
    n_behind_rows: int = 0
    """Their tokens."""
    n_loading: Mapping[str, int] = field(default_factory=dict)
    """By tier: tokens on their way to prompts."""


IDLE = Backlog()


def decide(
    plan: ReusePlan,
    found: Found,
    chunk_tokens: Sequence[int],
    n_suffix: int,
    backlog: Backlog = IDLE,
) -> ReuseDecision:
    """The plan's policy applied to one prompt.

    Args:
        plan: knobs; `plan.policy` names the policy.
        found: what the index holds for each chunk, None where it holds nothing.
        chunk_tokens: length of each chunk, tokens.
        n_suffix: tokens of the suffix, always computed.
        backlog: what other prompts wait for; read by rules that have a `rho`.
    """
    return _POLICIES[plan.policy](plan, found, chunk_tokens, n_suffix, backlog)


def room(rho: float, n_rows: int, n_piece: int, n_loading: int, backlog: Backlog) -> float:
    """Tokens that are worth loading from a tier rather than computed; the others hold prompts up.

    Loads and the first piece go layer by layer side by side, the other pieces follow. With x tokens
    loaded a prompt ends when all have come, or when the last piece is computed, which begins behind
    the loads but for the first piece. What that is later than with all computed must be no more
    than what it saves those that wait for the engine, x each; and all loads must be there when all
    that waits would have been computed. A tier that is no slower than computing has no limit: it
    never holds up more than computing would.

    Args:
        rho: seconds to load a token over seconds to compute it.
        n_rows: of the prompt, if nothing is loaded from this tier.
        n_piece: rows of a prefill piece, at most.
        n_loading: tokens on their way from the tier.
    """
    if rho <= 1:
        return math.inf
    ahead, late = backlog.n_ahead, rho * n_loading
    least = (ahead + n_rows + backlog.n_behind_rows - late) / rho
    if rho > backlog.n_behind:
        least = min(least, (ahead + n_rows - late) / (rho - backlog.n_behind))
    if rho > 1 + backlog.n_behind:
        least = min(least, (ahead + n_piece - late) / (rho - 1 - backlog.n_behind))
    return least


def _fates(
    plan: ReusePlan,
    found: Found,
    chunk_tokens: Sequence[int],
    n_suffix: int,
    backlog: Backlog,
    n_bands: int,
    count: CountRecomputed,
) -> tuple[ChunkFate, ...]:
    """Load what is found and pays, compute the rest; exact chunks are loaded whole.

    A rule of ratio 1 without `load_exact` loads nothing from its tier, whatever the policy.
    """
    n_prompt = sum(chunk_tokens) + n_suffix
    fates = []
    counted: dict[tuple[str, int, bool], tuple[tuple[int, ...], bool]] = {}
    offset = 0
    for ordinal, (entry, n) in enumerate(zip(found, chunk_tokens, strict=True)):
        fate = ChunkFate(offset, n, "", "", False, (n,) * n_bands)
        if entry is not None:
            exact = ordinal == 0 or entry.kind == "prefix"
            alike = entry.tier, n, exact
            if alike not in counted:  # chunks of one length and tier are many
                rule = plan.rule(entry.tier, n_prompt)
                recompute = (0,) * n_bands if exact else count(n, rule)
                pays = min(recompute) < n and rule.ratios[-1] < 1  # last band: the least of them
                counted[alike] = recompute, rule.load_exact if exact else pays
            recompute, pays = counted[alike]
            if pays:
                fate = ChunkFate(offset, n, entry.tier, entry.key, exact, recompute)
        fates.append(fate)
        offset += n
    return _in_time(plan, tuple(fates), n_prompt, backlog)


def _in_time(
    plan: ReusePlan, fates: tuple[ChunkFate, ...], n_prompt: int, backlog: Backlog
) -> tuple[ChunkFate, ...]:
    """`fates` without the loads that would hold up the prompt: those chunks are computed."""
    rhos = {f.tier: plan.rule(f.tier, n_prompt).rho or 0.0 for f in fates if f.is_loaded}
    slow = {tier: rho for tier, rho in rhos.items() if rho > 1}
    if not slow:
        return fates
    n_rows = n_prompt - sum(_n_loaded(f) for f in fates if f.is_loaded and f.tier not in slow)
    piece, loading = plan.prefill_chunk_tokens, backlog.n_loading
    rooms = {
        tier: room(rho, n_rows, piece, loading.get(tier, 0), backlog) for tier, rho in slow.items()
    }
    kept = []
    for fate in fates:
        if fate.tier in slow:
            if _n_loaded(fate) <= rooms[fate.tier]:
                rooms[fate.tier] -= _n_loaded(fate)
            else:
                n = fate.n_tokens
                fate = ChunkFate(fate.offset, n, "", "", False, (n,) * len(fate.n_recompute))
        kept.append(fate)
    return tuple(kept)


def _n_loaded(fate: ChunkFate) -> int:
    """Tokens of a loaded chunk that come from its tier, on average over the bands."""
    return fate.n_tokens - sum(fate.n_recompute) // len(fate.n_recompute)


def _full_recompute(
    plan: ReusePlan, found: Found, chunk_tokens: Sequence[int], n_suffix: int, backlog: Backlog
) -> ReuseDecision:
    nothing: Found = [None] * len(chunk_tokens)
    return ReuseDecision(_fates(plan, nothing, chunk_tokens, n_suffix, backlog, 1, _none), n_suffix)


def _prefix_cache(
    plan: ReusePlan, found: Found, chunk_tokens: Sequence[int], n_suffix: int, backlog: Backlog
) -> ReuseDecision:
    kept: list[ChunkEntry | None] = []
    for ordinal, entry in enumerate(found):
        usable = entry is not None and (ordinal == 0 or entry.kind == "prefix")
        if not usable:
            break
        kept.append(entry)
    kept += [None] * (len(chunk_tokens) - len(kept))
    return ReuseDecision(_fates(plan, kept, chunk_tokens, n_suffix, backlog, 1, _none), n_suffix)


def _full_reuse(
    plan: ReusePlan, found: Found, chunk_tokens: Sequence[int], n_suffix: int, backlog: Backlog
) -> ReuseDecision:
    return ReuseDecision(_fates(plan, found, chunk_tokens, n_suffix, backlog, 1, _none), n_suffix)


def _cachetune(
    plan: ReusePlan, found: Found, chunk_tokens: Sequence[int], n_suffix: int, backlog: Backlog
) -> ReuseDecision:
    n_bands = max(len(rule.ratios) for rule in plan.rules)

    def count(n: int, rule: RatioRule) -> tuple[int, ...]:
        ratios = [rule.ratios[b * len(rule.ratios) // n_bands] for b in range(n_bands)]
        return tuple(n_recomputed(r, n) for r in ratios)

    fates = _fates(plan, found, chunk_tokens, n_suffix, backlog, n_bands, count)
    return ReuseDecision(fates, n_suffix, n_bands)


def _epic(
    plan: ReusePlan, found: Found, chunk_tokens: Sequence[int], n_suffix: int, backlog: Backlog
) -> ReuseDecision:
    def count(n: int, rule: RatioRule) -> tuple[int, ...]:
        return (min(plan.epic_tokens, n),)

    return ReuseDecision(_fates(plan, found, chunk_tokens, n_suffix, backlog, 1, count), n_suffix)


def _cacheblend(
    plan: ReusePlan, found: Found, chunk_tokens: Sequence[int], n_suffix: int, backlog: Backlog
) -> ReuseDecision:
    n_prompt = sum(chunk_tokens) + n_suffix
    fates = _fates(plan, found, chunk_tokens, n_suffix, backlog, 1, _none)
    selected = 0
    for fate in fates:
        if fate.is_loaded and not fate.exact:
            selected += n_recomputed(plan.rule(fate.tier, n_prompt).ratios[0], fate.n_tokens)
    if not any(fate.is_loaded for fate in fates):
        return ReuseDecision(fates, n_suffix)
    return ReuseDecision(fates, n_suffix, 1, "deviation", CHECK_LAYER, selected)


def n_recomputed(ratio: float, n: int) -> int:
    """floor(ratio * n), safe against the last bit of the product."""
    return min(n, int(ratio * n + 1e-9))


def _none(n: int, rule: RatioRule) -> tuple[int, ...]:
    return (0,)


_POLICIES = {
    "full_recompute": _full_recompute,
    "prefix_cache": _prefix_cache,
    "full_reuse": _full_reuse,
    "cacheblend": _cacheblend,
    "epic": _epic,
    "cachetune": _cachetune,
}
