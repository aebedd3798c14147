"""Who makes room in a tier: bytes are promised before they are written, over all processes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from ..core.errors import CapacityError
from .catalog import POLL_S, Catalog
from .device_chunks import DeviceChunk
from .store_index import Kept
from .tiers import StoreTier

log = logging.getLogger(__name__)

ROOM_WAIT_S = 10.0

Doomed = list[tuple[StoreTier, str, int]]
"""Chunks that have left a tier whose medium still holds that many bytes of them."""

Fallen = list[tuple[Kept, DeviceChunk]]
"""Chunks that have gone from a device to RAM, where their bytes are not yet."""


class Room:
    """Takes bytes of tiers, evicting by each tier's policy. Never more than the capacity.

    Args:
        to_ram: brings to RAM what was on a device, after it was evicted from there.
    """

    def __init__(self, catalog: Catalog, to_ram: Callable[[Kept, DeviceChunk], None]) -> None:
        self.evictions = 0
        self.demotions = 0
        """Evictions after which a lower tier still has the chunk."""
        self.remove_failures = 0
        """Bytes that could not be removed, as from a remote tier that does not answer."""
        self._catalog = catalog
        self._to_ram = to_ram

    @contextmanager
    def take(self, key: str, tier: StoreTier, n_bytes: int) -> Iterator[None]:
        """Have `n_bytes` of a tier for a claimed chunk; given back if the body fails.

        Raises:
            CapacityError: larger than the tier, or others hold it all for too long.
        """
        catalog = self._catalog
        deadline_s = time.monotonic() + ROOM_WAIT_S
        while not self._take(key, tier, n_bytes):
            # What is left may be claimed by others, who will soon be done.
            if time.monotonic() > deadline_s:
                raise CapacityError(
                    f"tier '{tier.name}' must have room for a chunk",
                    values=f"{n_bytes} bytes, {tier.used_bytes} in use by other writers",
                    remedy="raise capacity_bytes, or use fewer writers",
                )
            with catalog.changed:
                catalog.changed.wait(POLL_S)
        try:
            yield
        except BaseException:
            self._give_back(key, tier, n_bytes)
            raise

    def shrink(self, tiers: Iterable[StoreTier]) -> int:
        """Evict what is beyond the capacities, as after opening with smaller ones; how many."""
        for tier in tiers:
            before = -1
            while not self._take("", tier, 0) and self.evictions > before:
                before = self.evictions
        return self.evictions

    def remove_bytes(self, tier: StoreTier, key: str) -> None:
        """Remove what a medium holds of a claimed chunk; trouble is counted, not raised.

        What a remote tier does not remove is tried again by who next takes room there.
        """
        try:
            if tier.remote is None:
                self._catalog.path(key).unlink(missing_ok=True)
            else:
                tier.remote.remove(key)
        except OSError as e:
            self.remove_failures += 1
            if tier.remote is not None:
                self._catalog.leftovers[key] = tier.name
            log.warning("chunk %s could not be removed from tier '%s': %s", key, tier.name, e)

    def _give_back(self, key: str, tier: StoreTier, n_bytes: int) -> None:
        """Nothing is promised any more for a claimed chunk."""
        catalog = self._catalog
        with catalog.changed:
            try:
                if not catalog.closed:
                    with catalog.shared():
                        tier.used_bytes -= n_bytes
                        catalog.promise(key, "", 0)
            finally:
                catalog.changed.notify_all()

    def _take(self, key: str, tier: StoreTier, n_bytes: int) -> bool:
        """Evict as needed and take the bytes; False when there are not enough yet."""
        catalog = self._catalog
        doomed: Doomed = []
        fallen: Fallen = []
        with catalog.changed:
            try:
                with catalog.shared():
                    self._evict_for(tier, n_bytes, doomed, fallen)
                    if tier.remote is not None:
                        doomed.extend((tier, half, 0) for half in catalog.claim_halves(tier))
                    taken = tier.fits(n_bytes)
                    if taken and n_bytes:
                        tier.used_bytes += n_bytes
                        catalog.promise(key, tier.name, n_bytes)
            except BaseException:  # nothing was changed
                catalog.claimed.difference_update(gone for _, gone, _ in doomed)
                catalog.changed.notify_all()
                raise
        try:
            self.remove(doomed)
            for victim, copy in fallen:
                self._fall(victim, copy)
        except BaseException:
            if taken and n_bytes:
                self._give_back(key, tier, n_bytes)
            raise
        return taken

    def _fall(self, victim: Kept, copy: DeviceChunk) -> None:
        """Bring to RAM what has fallen there; if that fails, its file is read at its next use."""
        try:
            self._to_ram(victim, copy)
        except Exception as e:  # whatever a device or the system has against it
            log.warning("chunk %s is not in RAM yet: %s", victim.entry.key, e)

    def _evict_for(self, tier: StoreTier, n_bytes: int, doomed: Doomed, fallen: Fallen) -> None:
        """Evict until the bytes fit once those of `doomed` are removed; fills it and `fallen`."""
        catalog = self._catalog
        freed = 0
        busy: set[str] | None = None
        while not tier.fits(n_bytes - freed):
            if busy is None:
                busy = catalog.busy()
                continue  # a dead process may have held it all
            victim = self._victim(tier, busy)
            if victim is None or not self._demoted(victim, tier, doomed, fallen):
                break
            self.evictions += 1
            if catalog.leave(victim, tier, evicted=True):
                freed += victim.entry.n_bytes
                busy.add(victim.entry.key)
                doomed.append((tier, victim.entry.key, victim.entry.n_bytes))

    def _demoted(self, victim: Kept, tier: StoreTier, doomed: Doomed, fallen: Fallen) -> bool:
        """Have the victim counted in the tier below, if there is one; False: once more later."""
        below = self._catalog.below(tier)
        size = victim.entry.n_bytes
        if below is None or below.name in victim.tiers or not below.can_hold(size):
            return True
        before = len(doomed)
        self._evict_for(below, size, doomed, fallen)
        if below.fits(size):
            self._catalog.add_place(victim, below)
            self.demotions += 1
            copy = self._catalog.on_device.get(victim.entry.key)
            if copy is not None and below.is_dram:
                fallen.append((victim, copy))
            return True
        return len(doomed) == before  # nothing can leave the tier below: then it is lost

    def _victim(self, tier: StoreTier, busy: set[str]) -> Kept | None:
        kept = self._catalog.kept
        free = (key for key, c in kept.items() if tier.name in c.tiers and key not in busy)
        key = tier.evictor.victim(free)
        return None if key is None else kept[key]

    def remove(self, doomed: Doomed, *, claimed: bool = False) -> None:
        """Remove the bytes of chunks that have left; what was promised for them is free then."""
        if not doomed:
            return
        catalog = self._catalog
        removed = False
        try:
            for tier, key, _ in doomed:
                self.remove_bytes(tier, key)
            removed = True
        finally:
            with catalog.changed:  # held throughout: whoever claims one of them next must keep it
                try:
                    if removed:
                        self._free(doomed, claimed)
                finally:
                    # A claim that could not be released is ours, and dead: `busy` clears it up.
                    if not claimed:
                        catalog.claimed.difference_update(key for _, key, _ in doomed)
                    catalog.changed.notify_all()

    def _free(self, doomed: Doomed, claimed: bool) -> None:
        """Nothing is promised any more for chunks whose bytes are gone. Hold `changed`."""
        catalog = self._catalog
        with catalog.shared():
            for tier, key, n_bytes in doomed:
                tier.used_bytes -= n_bytes
                if claimed:
                    catalog.promise(key, "", 0)
                else:
                    catalog.release(key)
