"""Fixed lengths at fixed concurrency, as load tools run them: everybody at once, then one for one.

Equal lengths keep users in step with each other, so that TTFT is neither that of a lone request
nor that of random phases: prompts that come together are cut into the same steps again and again.
Engines differ in one way that decides it: prompt pieces ride on steps that decode too (vLLM,
TensorRT-LLM), or a step with prompts holds nothing else (SGLang's default), which keeps users in
lockstep for good. Who follows a request that ended misses the step that begins at that moment: his
prompt has yet to come from the client, and engines plan a step while the one before runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..simulator.model_cost import ModelCost


@dataclass(frozen=True)
class ClosedBatch:
    """`n_users` requests of one shape in flight, each replaced when it ends.

    Args:
        capacity: requests whose KV fits in memory; the others wait.
        token_budget: tokens of one step.
        mixed: whether prompt pieces ride on decode steps.
    """

    cost: ModelCost
    n_prompt: int
    n_output: int
    n_users: int
    capacity: int
    token_budget: int
    mixed: bool

    @cached_property
    def _steps(self) -> _StepTimes:
        return _StepTimes(self.cost, self.n_prompt, self.n_output)

    def run(self, n_requests: int, overhead_s: float) -> tuple[float, float]:
        """(mean TTFT, mean TPOT) in seconds of `n_requests`, `overhead_s` added to each step."""
        return _Run(self, n_requests, overhead_s).means()


class _StepTimes:
    """Seconds of steps of one shape: decode is linear in the context, prompt cuts repeat."""

    def __init__(self, cost: ModelCost, n_prompt: int, n_output: int) -> None:
        self._cost, self._n_prompt, self._n_output = cost, n_prompt, n_output
        self._lines: dict[int, tuple[float, float]] = {}
        self._prompts: dict[tuple[tuple[int, int], ...], float] = {}

    def decode_s(self, n: int, context: float) -> float:
        """A step of `n` decodes that read `context` tokens in all."""
        line = self._lines.get(n)
        if line is None:
            near, far = n * self._n_prompt, n * (self._n_prompt + self._n_output)
            low, high = self._cost.decode_s(n, near), self._cost.decode_s(n, far)
            slope = (high - low) / (far - near)
            line = self._lines[n] = (low - slope * near, slope)
        return line[0] + line[1] * context

    def prompts_s(self, pieces: Sequence[tuple[int, int]]) -> float:
        """A step of prompt pieces (tokens, tokens before them) alone."""
        key = tuple(sorted(pieces))
        found = self._prompts.get(key)
        if found is None:
            found = self._prompts[key] = self._cost.step_s(list(key), 0, 0)
        return found

    def attention_s(self, n: int, context: float) -> float:
        """What `n` decodes add to a step that is there anyway: they read their contexts."""
        return max(0.0, self.decode_s(n, context) - self.decode_s(n, 0.0)) if n else 0.0


class _Run:
    def __init__(self, batch: ClosedBatch, n_requests: int, overhead_s: float) -> None:
        self.batch, self.overhead_s, self.n_requests = batch, overhead_s, n_requests
        self.now_s = 0.0
        self.made: dict[int, int] = {}  # output tokens of those that decode
        self.first_s: dict[int, float] = {}
        self.sent_s: list[float] = []
        self.waiting: deque[list[int]] = deque()  # [request, prompt tokens done]
        self.coming: list[list[int]] = []  # the same, of those that the next step is without
        self.ttft_s: list[float] = []
        self.tpot_s: list[float] = []
        for _ in range(batch.n_users):
            self._send()

    def means(self) -> tuple[float, float]:
        while self.waiting or self.coming or self.made:
            if not self.made and not self.waiting:
                self._arrive(self.coming)
            pieces, ended = self._cut()
            missed, self.coming = self.coming, []
            self._step(pieces, alone=bool(missed))
            self._arrive(missed)
            for request in ended:
                self.ttft_s.append(self.now_s - self.sent_s[request])
                self.first_s[request] = self.now_s
                self.made[request] = 1
        later = self.tpot_s or [0.0]
        return sum(self.ttft_s) / len(self.ttft_s), sum(later) / len(later)

    def _send(self) -> None:
        if len(self.sent_s) < self.n_requests:
            self.coming.append([len(self.sent_s), 0])
            self.sent_s.append(self.now_s)

    def _arrive(self, requests: list[list[int]]) -> None:
        self.waiting.extend(requests)
        requests.clear()

    def _cut(self) -> tuple[list[tuple[int, int]], list[int]]:
        """Prompt pieces of the next step, first come first served, and whose prompts they end."""
        batch = self.batch
        left = batch.token_budget - (len(self.made) if batch.mixed else 0)
        pieces: list[tuple[int, int]] = []
        ended: list[int] = []
        while self.waiting and left > 0 and len(self.made) + len(ended) < batch.capacity:
            request, done = self.waiting[0]
            n = min(left, batch.n_prompt - done)
            pieces.append((n, done))
            left -= n
            if done + n < batch.n_prompt:
                self.waiting[0][1] = done + n
                break
            self.waiting.popleft()
            ended.append(request)
        return pieces, ended

    def _step(self, pieces: list[tuple[int, int]], alone: bool) -> None:
        """One step with prompts, or all decode steps until somebody ends; one only if `alone`."""
        steps, n = self.batch._steps, len(self.made)
        context = sum(self.made.values()) + n * self.batch.n_prompt
        if not pieces:
            count = 1 if alone else max(1, self.batch.n_output - max(self.made.values()))
            self._decode(count, steps.decode_s(n, context + n * (count - 1) / 2))
        elif self.batch.mixed:
            self._decode(1, steps.prompts_s(pieces) + steps.attention_s(n, context))
        else:
            self.now_s += steps.prompts_s(pieces) + self.overhead_s

    def _decode(self, count: int, step_s: float) -> None:
        self.now_s += count * (step_s + self.overhead_s)
        last = max(self.batch.n_output, 2)
        for request in list(self.made):
            self.made[request] += count
            if self.made[request] >= last:
                del self.made[request]
                self.tpot_s.append((self.now_s - self.first_s[request]) / (last - 1))
                self._send()


def bisect(error: Callable[[float], float], low: float, high: float, n: int) -> float:
    """Where `error`, which rises, crosses zero; an end of [low, high] if it does not."""
    if error(low) >= 0:
        return low
    for _ in range(n):
        middle = (low + high) / 2
        if error(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
