"""A candidate: what one replica of it is made of."""

from __future__ import annotations

from typing import get_args

import pytest
from cachetune.core.catalogue import Catalogue
from cachetune.core.layout import chunk_bytes
from cachetune.core.machine_spec import compose
from cachetune.core.model_spec import ModelSpec
from cachetune.tuner.candidate import Candidate, StoredFormat


@pytest.mark.parametrize("stored", get_args(StoredFormat))
def test_a_stored_token_takes_what_the_store_lays_out(
    catalogue: Catalogue, model: ModelSpec, stored: StoredFormat
):
    candidate = Candidate(machine=compose(catalogue, "H100-SXM"), stored=stored)
    kept = model.stored_as("native" if stored == "bf16" else stored)
    assert candidate.kv_bytes_per_token(model) == pytest.approx(chunk_bytes(kept, 32768) / 32768)
