"""Real passages and questions through the shipped tokenizer."""

from __future__ import annotations

import hashlib
import json

import pytest
from cachetune.calibration import text
from cachetune.calibration.corpus import docstrings_of, source_files
from cachetune.core.errors import WorkloadError

pytest.importorskip("tokenizers")


def test_tokenizer_is_the_recorded_one() -> None:
    recorded = json.loads(text.TOKENIZER_FILE.with_name("tokenizer_provenance.json").read_text())
    digest = hashlib.sha256(text.TOKENIZER_FILE.read_bytes()).hexdigest()
    assert digest == recorded["tokenizer_sha256"]
    assert text.load_tokenizer().get_vocab_size() == recorded["vocab_size"] == 4096


@pytest.mark.parametrize("sample", ["def f(x): return x", " héllo ∂t 中文\n\t\x00", "", "<|endx"])
def test_any_text_survives_a_round_trip(sample: str) -> None:
    tokenizer = text.load_tokenizer()
    assert tokenizer.decode(tokenizer.encode(sample).ids) == sample


def test_passages_are_exact_different_and_seeded() -> None:
    tokenizer = text.load_tokenizer()
    found = text.passages(tokenizer, 128, 24, seed=5)
    assert len(found) == 24 and len({p.token_ids for p in found}) == 24
    assert all(len(p.token_ids) == 128 and p.subjects for p in found)
    assert found == text.passages(tokenizer, 128, 24, seed=5)
    assert found != text.passages(tokenizer, 128, 24, seed=6)
    for passage in found:
        start = tokenizer.decode(passage.token_ids)
        assert start.startswith(passage.subjects[0].title)


def test_passages_that_are_not_there_are_refused() -> None:
    with pytest.raises(WorkloadError, match="ask for fewer or shorter passages"):
        text.passages(text.load_tokenizer(), 65_536, 1000, seed=0)


def test_a_question_names_what_its_passage_documents() -> None:
    tokenizer = text.load_tokenizer()
    found = text.passages(tokenizer, 64, 8, seed=1)
    for index, asked in text.questions(found, 20, seed=2):
        assert any(s.module in asked and s.name in asked for s in found[index].subjects)
        assert asked.strip().endswith("?")


def test_rag_requests_can_be_run_for_real() -> None:
    tokenizer = text.load_tokenizer()
    found = text.passages(tokenizer, 64, 12, seed=1)
    workload = text.rag_requests(
        7, found, tokenizer, n_requests=30, chunks_per_request=4, output_tokens=3
    )
    assert len(workload.requests) == 30 and len(workload.contents) == 12
    orders = set()
    for request in workload.requests:
        assert len(set(request.chunks)) == 4
        assert request.suffix_ids and len(request.suffix_ids) == request.suffix_tokens
        assert all(workload.contents[c].token_ids for c in request.chunks)
        orders.add(request.chunks)
    assert len(orders) > 25, "random orders and combinations"
    again = text.rag_requests(
        7, found, tokenizer, n_requests=30, chunks_per_request=4, output_tokens=3
    )
    assert workload.to_json() == again.to_json()


def test_corpus_is_sorted_and_free_of_tests() -> None:
    names = [name for name, _ in source_files()]
    assert names == sorted(names) and "json" in names and "json.decoder" in names
    assert not any("test" in name.split(".") for name in names)
    module, path = next(f for f in source_files() if f[0] == "json")
    documents = docstrings_of(module, path)
    assert documents[0].name == "" and "dumps" in {d.name for d in documents}
