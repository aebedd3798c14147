"""The task generators against an independent interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from cachetune.calibration import tasks
from cachetune.calibration.tasks import TASK_NAMES, TaskInstance, TaskName, make_instance, stream

N_CONTEXTS = 24


def instances(task: TaskName, n_chunks: int = 8, seed: int = 3) -> list[TaskInstance]:
    rng = stream(f"test/{task}", seed)
    return [make_instance(rng, task, n_chunks) for _ in range(N_CONTEXTS)]


def kind(token: int) -> tuple[str, int]:
    """Token class and index within it, from the layout of the vocabulary."""
    table = [
        ("key", tasks.KEY_0, tasks.N_KEYS),
        ("relative", tasks.RELATIVE_0, 16),
        ("absolute", tasks.ABSOLUTE_0, 16),
        ("header", tasks.HEADER_0, 16),
        ("answer", tasks.ANSWER_0, 16),
        ("recall", tasks.RECALL_VALUE_0, tasks.N_RECALL_VALUES),
        ("filler", tasks.FILLER_0, tasks.N_FILLERS),
    ]
    for name, first, count in table:
        if first <= token < first + count:
            return name, token - first
    return "control", token


def read_answer(tokens: Sequence[int], key: int) -> int:
    """Look the key up in a flat context, then scan backwards for the governing header."""
    at = tokens.index(key)
    name, value = kind(tokens[at + 1])
    if name == "recall":
        return tokens[at + 1]
    if name == "absolute":
        return tasks.ANSWER_0 + value
    assert name == "relative"
    for token in reversed(tokens[:at]):
        if kind(token)[0] == "header":
            return tasks.ANSWER_0 + (value + kind(token)[1]) % 16
    return tasks.ANSWER_0 + value


@pytest.mark.parametrize("task", TASK_NAMES)
def test_same_seed_same_instances(task: TaskName) -> None:
    assert instances(task) == instances(task)
    assert instances(task, seed=3) != instances(task, seed=4)
    assert stream("a", 0).integers(1 << 60) != stream("b", 0).integers(1 << 60)


@pytest.mark.parametrize("task", TASK_NAMES)
@pytest.mark.parametrize("n_chunks", [1, 2, 4, 8])
def test_shape_vocabulary_and_keys(task: TaskName, n_chunks: int) -> None:
    assert tasks.VOCAB_SIZE <= 512
    for one in instances(task, n_chunks):
        assert [len(c) for c in one.chunks] == [64] * n_chunks
        every = [t for c in one.chunks for t in c] + list(one.suffix)
        assert min(every) >= 0 and max(every) < tasks.VOCAB_SIZE
        assert not any(kind(t)[0] == "answer" for t in every)
        keys = [t for c in one.chunks for t in c if kind(t)[0] == "key"]
        assert len(keys) == len(set(keys)) == 8 * n_chunks
        asked = [one.suffix[p] for p in one.answer_positions]
        assert len(asked) == len(set(asked)) == min(24, 8 * n_chunks)
        assert set(asked) <= set(keys)
        assert all(one.suffix[p - 1] == tasks.ASK[task] for p in one.answer_positions)


@pytest.mark.parametrize("task", TASK_NAMES)
@pytest.mark.parametrize("n_chunks", [1, 3, 8])
def test_answers_match_an_independent_interpreter(task: TaskName, n_chunks: int) -> None:
    for one in instances(task, n_chunks):
        flat = [t for c in one.chunks for t in c]
        questions = zip(one.answer_positions, one.answers, one.cross_chunk, strict=True)
        for position, answer, cross in questions:
            key = one.suffix[position]
            assert read_answer(flat, key) == answer
            alone = next(c for c in one.chunks if key in c)
            assert (read_answer(alone, key) != answer) == cross


def test_dependent_tokens_are_those_that_earlier_chunks_change() -> None:
    n_dependent = 0
    for one in instances("running_header"):
        for index, chunk in enumerate(one.chunks):
            before = [t for c in one.chunks[: index + 1] for t in c]
            keys = [t for t in chunk if kind(t)[0] == "key"]
            changed = {
                chunk.index(k) + 1 for k in keys if read_answer(before, k) != read_answer(chunk, k)
            }
            assert set(one.dependent_tokens[index]) == changed
            assert not changed & set(one.decoy_tokens[index])
            decoys = {i for i, t in enumerate(chunk) if kind(t)[0] == "absolute"}
            assert set(one.decoy_tokens[index]) == decoys
            n_dependent += len(changed)
        assert one.dependent_tokens[0] == ()
    # Must stay below the 5 % budget at which selectors are compared, and not vanish.
    assert 0.02 < n_dependent / (N_CONTEXTS * 512) < 0.05


def test_recall_depends_on_no_other_chunk() -> None:
    for one in instances("recall"):
        assert not any(one.cross_chunk)
        assert all(d == () for d in one.dependent_tokens)
        assert all(kind(t)[0] in ("key", "recall", "filler") for c in one.chunks for t in c)


def test_one_header_at_most_and_fillers_follow_the_chain() -> None:
    with_header, follows = 0, []
    for one in instances("running_header"):
        for chunk in one.chunks:
            with_header += sum(kind(t)[0] == "header" for t in chunk)
            assert sum(kind(t)[0] == "header" for t in chunk) <= 1
            fillers = [kind(t)[1] for t in chunk if kind(t)[0] == "filler"]
            follows += list(itertools.pairwise(fillers))
    likely = np.mean([after == (5 * before + 3) % 64 for before, after in follows])
    assert 0.70 < with_header / (N_CONTEXTS * 8) < 0.90
    assert 0.55 < likely < 0.66
    assert len({before for before, _ in follows}) == 64


@pytest.mark.parametrize("n_chunks", [0, 9])
def test_impossible_chunk_count_is_refused(n_chunks: int) -> None:
    with pytest.raises(ValueError, match="n_chunks"):
        make_instance(stream("test", 0), "recall", n_chunks)
