"""`BlockPool`: KV capacity of the device in fixed blocks of tokens. No tensors, no policy."""

from __future__ import annotations

from .errors import CapacityError, InvariantViolation
from .units import ceil_div


class BlockPool:
    """Counts blocks by owner. used + free = capacity, always (INV-4)."""

    def __init__(self, n_blocks: int, block_tokens: int = 16) -> None:
        self.n_blocks = n_blocks
        self.block_tokens = block_tokens
        self._held: dict[int, int] = {}
        self._n_free = n_blocks

    @property
    def n_free(self) -> int:
        """Blocks nobody holds."""
        return self._n_free

    def can_allocate(self, n_tokens: int) -> bool:
        """Whether `n_tokens` fit now."""
        return ceil_div(n_tokens, self.block_tokens) <= self._n_free

    def allocate(self, owner: int, n_tokens: int) -> None:
        """Take blocks for `n_tokens`.

        Raises:
            CapacityError: more than the pool holds in all, so waiting cannot help.
        """
        need = ceil_div(n_tokens, self.block_tokens)
        if need > self.n_blocks:
            raise CapacityError(
                "a request must fit the KV capacity",
                values=f"{n_tokens} tokens need {need} blocks, the pool has {self.n_blocks}",
                remedy="shorten the request or give the KV cache more memory",
            )
        if need > self._n_free or owner in self._held:
            raise InvariantViolation(
                f"INV-4 allocate: owner {owner} needs {need}, free {self._n_free}, "
                f"already held {self._held.get(owner, 0)}"
            )
        self._held[owner] = need
        self._n_free -= need

    def free(self, owner: int) -> None:
        """Give back everything `owner` holds."""
        self._n_free += self._held.pop(owner)
        self.check_integrity()

    def check_integrity(self) -> None:
        """used + free = capacity."""
        used = sum(self._held.values())
        if used + self._n_free != self.n_blocks:
            raise InvariantViolation(
                f"INV-4 blocks: used {used} + free {self._n_free} != capacity {self.n_blocks}"
            )
