"""Task records: one context with questions whose answers are single tokens; made, or read.

A task file is JSON lines, so that any Hugging Face causal LM can be measured on any text. Each
line is one context:

    {"task": "my_task", "chunks": [[5, 9, 2], [7, 7, 1]], "suffix": [3, 4, 8],
     "answer_positions": [0, 2], "answers": [4, 6]}

`chunks` (two or more, all different) and `suffix` hold token ids of the model that is measured.
The logits at `suffix[answer_positions[q]]` must have their maximum at `answers[q]`. An answer of
several tokens is asked token by token: put it into the suffix and name the position before each
of its tokens. Optional: `cross_chunk`, one boolean per answer, true where the answer needs more
than one chunk; `dependent_tokens`, per chunk the indices whose meaning another chunk changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, ValidationError, model_validator

from ..core.errors import WorkloadError
from ..core.model_spec import ModelSpec
from ..core.record import Record
from .tasks import TASK_NAMES, TaskInstance, make_instance, stream

Tokens = tuple[int, ...]


class TaskRecord(Record):
    """One context; the module's text says what the fields mean."""

    task: str = Field(min_length=1)
    chunks: tuple[Tokens, ...]
    suffix: Tokens
    answer_positions: Tokens
    answers: Tokens
    cross_chunk: tuple[bool, ...] | None = None
    dependent_tokens: tuple[Tokens, ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> TaskRecord:
        if len(set(self.chunks)) != len(self.chunks) or len(self.chunks) < 2:
            raise ValueError(f"chunks must be two or more, all different, got {len(self.chunks)}")
        if not all(self.chunks):
            raise ValueError("each chunk must hold at least one token")
        n = len(self.answers)
        if not n or len(self.answer_positions) != n:
            raise ValueError(
                f"answers and answer_positions must be as many, at least one, got {n} and "
                f"{len(self.answer_positions)}"
            )
        outside = [p for p in self.answer_positions if not 0 <= p < len(self.suffix)]
        if outside:
            raise ValueError(
                f"answer_positions must lie in the suffix of {len(self.suffix)}, got {outside[0]}"
            )
        if self.cross_chunk is not None and len(self.cross_chunk) != n:
            raise ValueError(f"cross_chunk must hold {n} booleans, got {len(self.cross_chunk)}")
        if self.dependent_tokens is not None:
            if len(self.dependent_tokens) != len(self.chunks):
                raise ValueError(f"dependent_tokens must hold {len(self.chunks)} lists")
            for chunk, indices in zip(self.chunks, self.dependent_tokens, strict=True):
                if any(not 0 <= i < len(chunk) for i in indices):
                    raise ValueError(f"dependent_tokens must be indices of a chunk of {len(chunk)}")
        return self

    def check_fits(self, model: ModelSpec, source: str) -> None:
        """Refuse token ids or a length that the model does not have.

        Raises:
            WorkloadError: says which.
        """
        n_tokens = sum(map(len, self.chunks)) + len(self.suffix)
        top = max(map(max, (*self.chunks, self.suffix, self.answers)))
        low = min(map(min, (*self.chunks, self.suffix, self.answers)))
        if low < 0 or top >= model.vocab_size:
            raise WorkloadError(
                f"{source}: token ids must lie in the model's vocabulary of {model.vocab_size}",
                values=str(low if low < 0 else top),
                remedy="make the task file with this model's tokenizer",
            )
        if n_tokens + 1 > model.max_position:
            raise WorkloadError(
                f"{source}: the context must fit the model's {model.max_position} positions",
                values=f"{n_tokens} tokens",
                remedy="use shorter or fewer chunks",
            )


def record_of(instance: TaskInstance) -> TaskRecord:
    """A synthetic instance as a record."""
    return TaskRecord(
        task=instance.task,
        chunks=instance.chunks,
        suffix=instance.suffix,
        answer_positions=instance.answer_positions,
        answers=instance.answers,
        cross_chunk=instance.cross_chunk,
        dependent_tokens=instance.dependent_tokens,
    )


def toy_records(seed: int, n_contexts: int) -> dict[str, list[TaskRecord]]:
    """Fresh contexts of the project's two tasks; context i is the same whatever `n_contexts`."""
    return {
        task: [
            record_of(make_instance(stream(f"quality/{task}/{i}", seed), task))
            for i in range(n_contexts)
        ]
        for task in TASK_NAMES
    }


def toy_library(seed: int, n_contexts: int = 4) -> dict[str, list[Tokens]]:
    """Chunks of other contexts, per task: what a chunk is encoded behind to see what it needs."""
    return {
        task: [
            chunk
            for i in range(n_contexts)
            for chunk in make_instance(stream(f"quality/library/{task}/{i}", seed), task).chunks
        ]
        for task in TASK_NAMES
    }


def read_task_file(path: str | Path, model: ModelSpec) -> dict[str, list[TaskRecord]]:
    """Records per task, in the order of the file; blank lines are skipped.

    Raises:
        WorkloadError: not readable, empty, or a line that breaks a rule, with its number.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "not UTF-8"
        raise WorkloadError(
            "the task file must be readable", values=f"{path}: {why}", remedy="check the path"
        ) from None
    found: dict[str, list[TaskRecord]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = TaskRecord.model_validate_json(line)
        except ValidationError as e:
            first = e.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the record"
            raise WorkloadError(
                f"{path}, line {number}: {where}: {first['msg'].removeprefix('Value error, ')}",
                remedy="correct the line",
            ) from None
        record.check_fits(model, f"{path}, line {number}")
        found.setdefault(record.task, []).append(record)
    if not found:
        raise WorkloadError(
            "a task file must hold at least one context", values=f"{path}: 0", remedy="add lines"
        )
    return found


def library_of(records: Sequence[TaskRecord], evaluated: int) -> list[Tokens]:
    """Chunks of all other contexts, without those that the evaluated one holds itself."""
    own = set(records[evaluated].chunks)
    others = (c for i, r in enumerate(records) if i != evaluated for c in r.chunks)
    return [chunk for chunk in dict.fromkeys(others) if chunk not in own]
