"""Synthetic tasks on which the quality of KV reuse is measured (numpy only).

Two tasks share one vocabulary and one small model. In `running_header` a record can only be
encoded correctly by reading another chunk; in `recall` every chunk is self-contained, so blind
reuse of its KV should lose nothing. Chunks of one context hold disjoint keys, there is no BOS
token, and chunk 0 sits at position 0.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

TaskName = Literal["running_header", "recall"]
TASK_NAMES: tuple[TaskName, ...] = ("running_header", "recall")

MODULUS = 16
N_KEYS = 64
N_FILLERS = 64
N_RECALL_VALUES = 64
CHUNK_TOKENS = 64
RECORDS_PER_CHUNK = 8
MAX_CHUNKS = N_KEYS // RECORDS_PER_CHUNK
MAX_QUESTIONS = 24
HEADER_PROBABILITY = 0.8
DECOY_PROBABILITY = 0.3

ASK: dict[TaskName, int] = {"running_header": 0, "recall": 1}
KEY_0 = 8
RELATIVE_0 = KEY_0 + N_KEYS
ABSOLUTE_0 = RELATIVE_0 + MODULUS
HEADER_0 = ABSOLUTE_0 + MODULUS
ANSWER_0 = HEADER_0 + MODULUS
RECALL_VALUE_0 = ANSWER_0 + MODULUS
FILLER_0 = RECALL_VALUE_0 + N_RECALL_VALUES
VOCAB_SIZE = FILLER_0 + N_FILLERS

NOT_A_VALUE = -1

# Affine successors keep the chain identical under every numpy version; the first one alone
# already visits all 64 fillers.
_SUCCESSORS = ((5, 3), (13, 18), (29, 41), (37, 12))
_SUCCESSOR_CUMULATIVE = (0.60, 0.85, 0.95, 1.0)

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class TaskInstance:
    """One context with its questions. Token ids lie in [0, VOCAB_SIZE).

    `answer_positions`, `answers` and `cross_chunk` run over the questions; the first holds
    indices within `suffix` at which the logits give the answer. `dependent_tokens`,
    `decoy_tokens` and `resolved` run over the chunks.
    """

    task: TaskName
    chunks: tuple[Tokens, ...]
    suffix: Tokens
    answer_positions: tuple[int, ...]
    answers: Tokens
    cross_chunk: tuple[bool, ...]
    """Whether the answer depends on state held in another chunk than the record's own."""
    dependent_tokens: tuple[tuple[int, ...], ...]
    """Indices within the chunk of tokens whose meaning another chunk changes: the upper bound."""
    decoy_tokens: tuple[tuple[int, ...], ...]
    """Indices of value tokens that look alike but depend on no header."""
    resolved: tuple[Tokens, ...]
    """Per chunk token: the answer id a value token stands for, NOT_A_VALUE elsewhere."""


def stream(name: str, seed: int) -> np.random.Generator:
    """Independent random generator for a named purpose; the same pair gives the same draws."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _fillers(rng: np.random.Generator, count: int) -> list[int]:
    state = int(rng.integers(N_FILLERS))
    tokens = []
    for branch in np.searchsorted(_SUCCESSOR_CUMULATIVE, rng.random(count), side="right"):
        tokens.append(FILLER_0 + state)
        factor, shift = _SUCCESSORS[int(branch)]
        state = (factor * state + shift) % N_FILLERS
    return tokens


def _values(rng: np.random.Generator, task: TaskName, count: int) -> list[int]:
    if task == "recall":
        return [RECALL_VALUE_0 + int(v) for v in rng.integers(N_RECALL_VALUES, size=count)]
    decoy = rng.random(count) < DECOY_PROBABILITY
    base = np.where(decoy, ABSOLUTE_0, RELATIVE_0)
    return [int(v) for v in base + rng.integers(MODULUS, size=count)]


def make_chunk(rng: np.random.Generator, task: TaskName, keys: Sequence[int]) -> Tokens:
    """One chunk of CHUNK_TOKENS ids holding a record for each of `keys` (key token ids).

    A record is two adjacent tokens, key then value. The filler chain starts afresh in every
    chunk and continues across records, so nothing but a header reaches over a chunk's edge.
    """
    records = list(zip(keys, _values(rng, task, len(keys)), strict=True))
    headers: list[int] = []
    if task == "running_header" and rng.random() < HEADER_PROBABILITY:
        headers.append(HEADER_0 + int(rng.integers(MODULUS)))
    fillers = _fillers(rng, CHUNK_TOKENS - 2 * len(records) - len(headers))
    n_units = len(records) + len(headers) + len(fillers)
    special = rng.permutation(n_units)[: len(records) + len(headers)]
    units: list[Tokens | None] = [None] * n_units
    for place, unit in zip(special, [*records, *((h,) for h in headers)], strict=True):
        units[int(place)] = unit
    filler = iter(fillers)
    return tuple(t for unit in units for t in (unit if unit is not None else (next(filler),)))


def resolve(chunks: Sequence[Tokens]) -> tuple[Tokens, ...]:
    """Answer id of every value token when `chunks` are read in order, NOT_A_VALUE elsewhere.

    Before any header the running shift is 0.
    """
    shift = 0
    rows: list[Tokens] = []
    for chunk in chunks:
        row: list[int] = []
        for token in chunk:
            meaning = NOT_A_VALUE
            if HEADER_0 <= token < ANSWER_0:
                shift = token - HEADER_0
            elif RELATIVE_0 <= token < ABSOLUTE_0:
                meaning = ANSWER_0 + (token - RELATIVE_0 + shift) % MODULUS
            elif ABSOLUTE_0 <= token < HEADER_0:
                meaning = ANSWER_0 + token - ABSOLUTE_0
            elif RECALL_VALUE_0 <= token < FILLER_0:
                meaning = token
            row.append(meaning)
        rows.append(tuple(row))
    return tuple(rows)


def pose(
    rng: np.random.Generator,
    task: TaskName,
    chunks: Sequence[Tokens],
    n_questions: int = MAX_QUESTIONS,
) -> TaskInstance:
    """Ask about up to `n_questions` distinct records of `chunks`, in random order.

    The suffix is `[ask] key` repeated; no answer is ever fed back.
    """
    resolved = resolve(chunks)
    dependent: list[tuple[int, ...]] = []
    decoys: list[tuple[int, ...]] = []
    records: list[tuple[int, int, bool]] = []
    for chunk, row in zip(chunks, resolved, strict=True):
        alone = resolve([chunk])[0]
        values = [i for i, meaning in enumerate(row) if meaning != NOT_A_VALUE]
        dependent.append(tuple(i for i in values if row[i] != alone[i]))
        decoys.append(tuple(i for i in values if ABSOLUTE_0 <= chunk[i] < HEADER_0))
        records += [(chunk[i - 1], row[i], row[i] != alone[i]) for i in values]
    asked = [records[int(i)] for i in rng.permutation(len(records))[:n_questions]]
    return TaskInstance(
        task=task,
        chunks=tuple(chunks),
        suffix=tuple(t for key, _, _ in asked for t in (ASK[task], key)),
        answer_positions=tuple(range(1, 2 * len(asked), 2)),
        answers=tuple(answer for _, answer, _ in asked),
        cross_chunk=tuple(cross for _, _, cross in asked),
        dependent_tokens=tuple(dependent),
        decoy_tokens=tuple(decoys),
        resolved=resolved,
    )


def make_instance(
    rng: np.random.Generator, task: TaskName, n_chunks: int = MAX_CHUNKS
) -> TaskInstance:
    """A fresh context of `n_chunks` chunks (1 to MAX_CHUNKS) with its questions."""
    if not 1 <= n_chunks <= MAX_CHUNKS:
        raise ValueError(f"n_chunks must be in 1..{MAX_CHUNKS} (disjoint keys), got {n_chunks}")
    keys = (KEY_0 + rng.permutation(N_KEYS)).reshape(MAX_CHUNKS, RECORDS_PER_CHUNK)
    chunks = [make_chunk(rng, task, [int(k) for k in keys[i]]) for i in range(n_chunks)]
    return pose(rng, task, chunks)
