"""Named random streams: one root seed, one independent stream per purpose.

Adding a draw to one stream never moves another (papers on common random numbers ask for this).
"""

from __future__ import annotations

import hashlib

import numpy as np


def rng(seed: int, *names: str | int) -> np.random.Generator:
    """Generator for the stream called `names` under the root `seed`.

    >>> float(rng(0, "arrivals").random()) == float(rng(0, "arrivals").random())
    True
    """
    label = "/".join(str(name) for name in names)
    digest = hashlib.sha256(label.encode()).digest()
    words = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *words])))
