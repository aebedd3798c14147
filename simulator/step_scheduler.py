"""A plain re-implementation of the scheduler of one vLLM-v1 engine, nothing merged.

Semantics are those of vLLM 0.19 (v1 engine): running requests first, in order of admission; then
the waiting queue, first come first served, only when nobody was preempted in this step; chunked
prefill under a token budget; a request is admitted only if all its tokens fit; preemption takes the
last admitted, frees its blocks and puts it first in the queue; freed blocks keep their content
until they are taken again (prefix caching, whole blocks).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from .step_profile import Step


@dataclass(frozen=True)
class EngineLimits:
    """`n_blocks` counts what requests may use; None: KV memory never runs out."""

    max_num_seqs: int
    max_num_batched_tokens: int
    n_blocks: int | None
    block_size: int = 16
    prefix_caching: bool = True
    async_scheduling: bool = True


@dataclass(frozen=True)
class Arrival:
    """`content` names the whole blocks of the prompt; equal names are equal prefixes."""

    arrival_s: float
    n_prompt: int
    n_output: int
    content: tuple[int, ...] = ()


@dataclass
class Life:
    """Times of one request, seconds. `queued_s` is when the engine took it from its inbox."""

    queued_s: float = 0.0
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    n_preemptions: int = 0
    n_cached_tokens: int = 0


@dataclass
class Request:
    """One arrival on its way through an engine."""

    id: int
    arrival: Arrival
    computed: int = 0
    emitted: int = 0  # output tokens that came back
    flying: int = 0  # output tokens planned but not back
    blocks: list[int] = field(default_factory=list)
    life: Life = field(default_factory=Life)

    @property
    def n_tokens(self) -> int:
        """Of the prompt, and of the output that came back."""
        return self.arrival.n_prompt + self.emitted


class Blocks:
    """Block ids with reference counts; free ones queue, oldest first, and keep their content."""

    def __init__(self, n_blocks: int) -> None:
        self.free: OrderedDict[int, None] = OrderedDict((i, None) for i in range(n_blocks))
        self.users = [0] * n_blocks
        self.content: list[object] = [None] * n_blocks
        self.holder: dict[object, int] = {}

    def hit(self, names: Sequence[object]) -> list[int]:
        """Blocks that hold the longest known prefix of `names`."""
        found = []
        for name in names:
            block = self.holder.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def touch(self, blocks: Sequence[int]) -> None:
        for b in blocks:
            if self.users[b] == 0:
                del self.free[b]
            self.users[b] += 1

    def take(self, n: int) -> list[int]:
        taken = []
        for _ in range(n):
            b, _none = self.free.popitem(last=False)
            if self.content[b] is not None:
                del self.holder[self.content[b]]
                self.content[b] = None
            self.users[b] = 1
            taken.append(b)
        return taken

    def name(self, block: int, name: object) -> None:
        if self.content[block] is None and name not in self.holder:
            self.content[block] = name
            self.holder[name] = block

    def give_back(self, blocks: Sequence[int]) -> None:
        """The last block first, so that it is the first to be taken again."""
        for b in reversed(blocks):
            self.users[b] -= 1
            if self.users[b] == 0:
                self.free[b] = None


Plan = list[tuple[Request, int]]
"""(request, tokens) of one step."""
Launched = list[tuple[Request, bool]]
"""(request, whether it yields a token) of a step under way."""


class Scheduler:
    """Who runs, who waits, and whose the blocks are.

    Args:
        n_blocks: of KV memory.
    """

    def __init__(self, limits: EngineLimits, n_blocks: int) -> None:
        self.limits = limits
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.blocks = Blocks(n_blocks)
        self.n_preemptions = 0

    @property
    def is_busy(self) -> bool:
        """Whether anybody runs or waits."""
        return bool(self.waiting or self.running)

    def accept(self, request: Request, now: float) -> None:
        """Take a request from the inbox."""
        request.life.queued_s = now
        self.waiting.append(request)

    def plan(self, now: float) -> Plan:
        """The next step; empty: nothing can be done."""
        budget = self.limits.max_num_batched_tokens
        plan: Plan = []
        preempted = False
        i = 0
        while i < len(self.running) and budget > 0:
            r = self.running[i]
            n = min(self._wanted(r), budget)
            if n == 0:
                i += 1
                continue
            while not self._grow(r, n):
                victim = self.running.pop()
                self._preempt(victim)
                preempted = True
                if victim is r:
                    break
            else:
                plan.append((r, n))
                budget -= n
                i += 1
                continue
            break
        if not preempted:
            self._admit(plan, budget, now)
        return plan

    def _wanted(self, r: Request) -> int:
        if r.emitted + r.flying >= r.arrival.n_output:
            return 0
        return r.n_tokens + r.flying - r.computed

    def _admit(self, plan: Plan, budget: int, now: float) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.limits.max_num_seqs:
            r = self.waiting[0]
            hit = self._hit(r)
            computed = len(hit) * self.limits.block_size
            new = self._blocks_for(r.n_tokens) - len(hit)
            evicted = sum(1 for b in hit if self.blocks.users[b] == 0)
            if new + evicted > len(self.blocks.free):
                return
            self.waiting.popleft()
            self.blocks.touch(hit)
            r.blocks = list(hit)
            r.computed = computed
            r.life.n_cached_tokens += computed
            n = min(r.n_tokens - computed, budget)
            if not self._grow(r, n):
                raise AssertionError("a request that fits must fit")
            if r.life.n_preemptions == 0:
                r.life.scheduled_s = now
            self.running.append(r)
            plan.append((r, n))
            budget -= n

    def _hit(self, r: Request) -> list[int]:
        if not self.limits.prefix_caching:
            return []
        whole = (r.n_tokens - 1) // self.limits.block_size  # the last token is always computed
        return self.blocks.hit([self._name(r, i) for i in range(whole)])

    def _name(self, r: Request, i: int) -> object:
        content = r.arrival.content
        return content[i] if i < len(content) else (r.id, i)

    def _blocks_for(self, n_tokens: int) -> int:
        return -(-n_tokens // self.limits.block_size)

    def _grow(self, r: Request, n: int) -> bool:
        """Blocks for `n` more tokens; False when there are too few."""
        need = self._blocks_for(r.computed + n) - len(r.blocks)
        if need > len(self.blocks.free):
            return False
        r.blocks += self.blocks.take(max(need, 0))
        return True

    def _preempt(self, r: Request) -> None:
        self.blocks.give_back(r.blocks)
        r.blocks = []
        r.computed = 0
        r.life.n_preemptions += 1
        self.n_preemptions += 1
        self.waiting.appendleft(r)

    @staticmethod
    def step(plan: Plan) -> Step:
        """What a plan asks of the device."""
        pieces = [(n, r.computed) for r, n in plan if n > 1]
        contexts = [r.computed for r, n in plan if n == 1]
        return Step(pieces, len(contexts), sum(contexts), max(contexts) if contexts else None)

    def launch(self, plan: Plan) -> Launched:
        """Advance the plan's requests; which of them yield a token."""
        launched = []
        for r, n in plan:
            before = r.computed
            r.computed += n
            size = self.limits.block_size
            if self.limits.prefix_caching:
                for i in range(before // size, r.computed // size):
                    self.blocks.name(r.blocks[i], self._name(r, i))
            yields = r.computed >= r.n_tokens + r.flying
            if yields:
                r.flying += 1
            launched.append((r, yields))
        return launched

    def finish(self, launched: Launched, now: float) -> None:
        """A step is done at `now`: tokens come back, and who has all of them leaves."""
        gone = set()
        for r, yields in launched:
            if not yields:
                continue
            r.flying -= 1
            r.emitted += 1
            if r.emitted == 1:
                r.life.first_token_s = now
            if r.emitted == r.arrival.n_output:
                r.life.last_token_s = now
                self.blocks.give_back(r.blocks)
                r.blocks = []
                gone.add(r.id)
        if gone:
            self.running = [r for r in self.running if r.id not in gone]
            self.waiting = deque(r for r in self.waiting if r.id not in gone)
