"""The policies: each decides the fate of every token, for both executors. Written once.

Sources: CacheTune 2605.24022 section 4 (offline rank, ratio per hardware), CacheBlend EuroSys'25
(deviation at a check layer), EPIC ICML'25 (first k tokens of each chunk).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def decide(
    plan: ReusePlan, found: Found, chunk_tokens: Sequence[int], n_suffix: int
) -> ReuseDecision:
    """The plan's policy applied to one prompt.

    Args:
        plan: knobs; `plan.policy` names the policy.
        found: what the index holds for each chunk, None where it holds nothing.
        chunk_tokens: length of each chunk, tokens.
        n_suffix: tokens of the suffix, always computed.
    """
    return _POLICIES[plan.policy](plan, found, chunk_tokens, n_suffix)


def _fates(
    plan: ReusePlan,
    found: Found,
    chunk_tokens: Sequence[int],
    n_suffix: int,
    n_bands: int,
    count: CountRecomputed,
) -> tuple[ChunkFate, ...]:
    """Load what is found and pays, compute the rest; exact chunks are loaded whole."""
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
                counted[alike] = recompute, rule.load_exact if exact else min(recompute) < n
            recompute, pays = counted[alike]
            if pays:
                fate = ChunkFate(offset, n, entry.tier, entry.key, exact, recompute)
        fates.append(fate)
        offset += n
    return tuple(fates)


def _full_recompute(
    plan: ReusePlan, found: Found, chunk_tokens: Sequence[int], n_suffix: int
) -> ReuseDecision:
    nothing: Found = [None] * len(chunk_tokens)
    return ReuseDecision(_fates(plan, nothing, chunk_tokens, n_suffix, 1, _none), n_suffix)


def _prefix_cache(
    plan: ReusePlan, found: Found, chunk_tokens: Sequence[int], n_suffix: int
) -> ReuseDecision:
    kept: list[ChunkEntry | None] = []
    for ordinal, entry in enumerate(found):
        usable = entry is not None and (ordinal == 0 or entry.kind == "prefix")
        if not usable:
            break
        kept.append(entry)
    kept += [None] * (len(chunk_tokens) - len(kept))
    return ReuseDecision(_fates(plan, kept, chunk_tokens, n_suffix, 1, _none), n_suffix)


def _full_reuse(
    plan: ReusePlan, found: Found, chunk_tokens: Sequence[int], n_suffix: int
) -> ReuseDecision:
    return ReuseDecision(_fates(plan, found, chunk_tokens, n_suffix, 1, _none), n_suffix)


def _cachetune(
    plan: ReusePlan, found: Found, chunk_tokens: Sequence[int], n_suffix: int
) -> ReuseDecision:
    n_bands = max(len(rule.ratios) for rule in plan.rules)

    def count(n: int, rule: RatioRule) -> tuple[int, ...]:
        ratios = [rule.ratios[b * len(rule.ratios) // n_bands] for b in range(n_bands)]
        return tuple(n_recomputed(r, n) for r in ratios)

    fates = _fates(plan, found, chunk_tokens, n_suffix, n_bands, count)
    return ReuseDecision(fates, n_suffix, n_bands)


def _epic(
    plan: ReusePlan, found: Found, chunk_tokens: Sequence[int], n_suffix: int
) -> ReuseDecision:
    def count(n: int, rule: RatioRule) -> tuple[int, ...]:
        return (min(plan.epic_tokens, n),)

    return ReuseDecision(_fates(plan, found, chunk_tokens, n_suffix, 1, count), n_suffix)


def _cacheblend(
    plan: ReusePlan, found: Found, chunk_tokens: Sequence[int], n_suffix: int
) -> ReuseDecision:
    n_prompt = sum(chunk_tokens) + n_suffix
    fates = _fates(plan, found, chunk_tokens, n_suffix, 1, _none)
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
