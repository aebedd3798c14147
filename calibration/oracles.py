"""Two orders of a chunk's tokens that need the actual prompt: references, not deployable.

`oracle_deviation` knows the true K and V, which takes the prefill that reuse is to avoid;
`dependent_first` knows which tokens depend on another chunk, which only the task's author does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..core.chunk_index import content_id_of
from ..core.selectors import stored_order
from .task_file import TaskRecord

if TYPE_CHECKING:
    from torch import Tensor

    from ..runtime.runner import Runner

ORACLE_DEVIATION = "oracle_deviation"
DEPENDENT_FIRST = "dependent_first"


def ingest_oracles(runner: Runner, record: TaskRecord, tier: str) -> list[str]:
    """Store the record's chunks under both names, in orders made for this one prompt.

    The K and V are those of any other entry: the chunk encoded alone.

    Returns:
        The names stored; `dependent_first` is left out where the record does not know.
    """
    import torch

    encode = runner.transformer.encode
    names = [ORACLE_DEVIATION]
    if record.dependent_tokens is not None:
        names.append(DEPENDENT_FIRST)
    with torch.inference_mode():
        true = encode(torch.tensor([t for chunk in record.chunks for t in chunk]))
        start = 0
        for ordinal, chunk in enumerate(record.chunks):
            alone = encode(torch.tensor(chunk))
            k, v = alone.host_k, alone.host_v
            stop = start + len(chunk)
            scores = {
                ORACLE_DEVIATION: _deviation(k, true.host_k[:, start:stop])
                + _deviation(v, true.host_v[:, start:stop])
            }
            if record.dependent_tokens is not None:
                scores[DEPENDENT_FIRST] = _listed(record.dependent_tokens[ordinal], len(chunk))
            for name in names:
                order = torch.from_numpy(stored_order(scores[name]))
                runner.store.put(content_id_of(chunk), k, v, order, order_name=name, tier=tier)
            start = stop
    return names


def _deviation(stored: Tensor, true: Tensor) -> np.ndarray:
    """`[N]`: norm of the difference over heads and dimensions, summed over layers.

    K is compared before RoPE: both would be rotated alike, which changes no norm.
    """
    norms = (stored.float() - true.float()).pow(2).sum(dim=(2, 3)).sqrt()
    out: np.ndarray = norms.sum(dim=0).numpy()
    return out


def _listed(indices: Sequence[int], n_tokens: int) -> np.ndarray:
    score = np.zeros(n_tokens, dtype=np.float32)
    score[list(indices)] = 1.0
    return score
