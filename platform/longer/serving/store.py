"""The replica's user states, on the device and in host memory behind it: `cache`'s index with the pools that hold the states.

States that a batch uses are pinned until its end (`release`). What has to leave the device goes to host memory, and from there
for good; what is asked for there comes back. On CUDA both ways are copies on streams of their own, from and to pinned memory: the
host waits for none, and the device only where it needs the memory. A state that came back leaves its copy in host memory as long
as nobody needs the room there: if it goes again as it came, nothing is copied.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from longer.model.longer import Longer
from longer.model.pool import StatePool
from longer.model.state_layout import Precision, StateLayout
from longer.model.states import UserState
from longer.serving.cache import Counters, Entry, Held, StateIndex, StateVersion, Tier
from longer.serving.copies import Copies, DevicePool, HostPool
from longer.serving.room import check_card, device_bytes_for, entry_bytes
from longer.slots import Slot

HeldState = Held[UserState]
StateEntry = Entry[UserState]


class StateStore:
    """At most `device_bytes` and `host_bytes` of states between batches, one a user. Not thread-safe.

    Memory is allocated once, in both tiers: the budget, what may lie idle, and on the device room for the states of one batch of
    `BATCH_USERS`. So what is within a budget always finds a slot.
    """

    def __init__(self, model: Longer, device_bytes: int, host_bytes: int = 0, precision: Precision = "float32") -> None:
        self.budget_bytes, self.host_budget_bytes, self.precision = device_bytes, host_bytes, precision
        self._index: StateIndex[UserState] = StateIndex(device_bytes, host_bytes, self._free)
        self._in_use: list[HeldState] = []
        self._lent: set[Slot] = set()
        self._copied_from: dict[
            HeldState, Slot
        ] = {}  # in host memory: the very same as on the device; the oldest first
        self._schema = model.schema
        check_card(precision, model.norm_head.weight.device)
        self._allocate(StateLayout.of(model, precision), model.norm_head.weight.device)

    def _allocate(self, layout: StateLayout, device: torch.device) -> None:
        self.layout = layout
        self._copies = Copies(device)
        self.pool = DevicePool(layout, device_bytes_for(layout, self.budget_bytes), device, self._copies)
        host_bytes = StatePool.bytes_for(layout, self.host_budget_bytes)
        self._host = HostPool(layout, host_bytes, self._copies) if self.host_budget_bytes else None

    def serve(self, version: StateVersion) -> None:
        """States of other versions go before all others from now on, and their room is free. Nothing may be in use."""
        self._index.serve(version)

    def fit(self, model: Longer) -> None:
        """Goes over to a model of another shape, if it is one: its states need other memory, so that none of the old ones stays.

        Nobody else may hold the pool. Where the memory cannot be had, the error leaves an empty store of the old shape.
        """
        layout, device = StateLayout.of(model, self.precision), model.norm_head.weight.device
        if layout == self.layout:
            return
        before = self.layout
        self._index.clear()
        if device.type == "cuda":  # torch keeps this memory, where no later `forget` looks
            self._copies.finish()
            self.pool.words_NI.zero_()
        del self.pool, self._host
        try:
            self._allocate(layout, device)
        except BaseException:
            self._allocate(before, device)
            raise

    # -- what is here -------------------------------------------------------------------------------------------------

    @property
    def counters(self) -> Counters:
        return self._index.counters

    @property
    def num_bytes(self) -> int:
        """Bytes of the states on the device."""
        return self._index.tiers[Tier.DEVICE].num_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of the states in host memory."""
        return self._index.tiers[Tier.HOST].num_bytes

    @property
    def reserved_bytes(self) -> tuple[int, int]:
        """What is really allocated on the device and in host memory: the budgets, room for what may lie idle and, on the device,
        for one batch, in whole slabs."""
        return self.pool.words_NI.nbytes, self._host.words_NI.nbytes if self._host else 0

    @property
    def index_bytes(self) -> int:
        """About what Python keeps of the states besides, in host memory."""
        return len(self) * entry_bytes(self._schema, self.layout.windows)

    @property
    def free_bytes(self) -> int:
        """New states of so many bytes come in, and nobody who can be answered from here goes for good for them."""
        device, host = self._index.tiers
        on_device = self.budget_bytes - device.current_bytes
        in_memory = self.host_budget_bytes - host.current_bytes
        # what leaves the device for them may be more than has to, by less than the largest of those who were there
        return on_device + max(0, in_memory - min(self.most_state_bytes, self.budget_bytes))

    @property
    def most_state_bytes(self) -> int:
        """Of the largest state."""
        return self.layout.largest_rows * self.layout.row_bytes

    def __len__(self) -> int:
        return len(self._index)

    def peek(self, user_key: int, version: StateVersion) -> StateEntry | None:
        """What is held of the user, which does not count as a use."""
        held = self._index.find(user_key)
        return held.entry if held and held.version == version else None

    def take(self, user_key: int, version: StateVersion) -> HeldState | None:
        """What is held of the user, now asked for, pinned until `release`; None, counted stale, if it is another version's."""
        held = self._index.get(user_key, version)
        if held is not None:
            self._pin(held)
        return held

    def hold(self, user_key: int, version: StateVersion) -> HeldState | None:
        """What is held of the user, pinned until `release`, which does not count as a use: who is asked about once, and then acts,
        has not come back."""
        held = self._index.find(user_key)
        if held is None or held.version != version:
            return None
        self._pin(held)
        return held

    # -- a batch's work -----------------------------------------------------------------------------------------------

    def bring(self, taken: Iterable[HeldState]) -> None:
        """The states are on the device from here on."""
        away = [held for held in taken if held.tier == Tier.HOST]
        if not away:
            return
        slots = [self._slot(held.entry.state.slot.size) for held in away]
        with self._copies.to_device():
            for held, slot in zip(away, slots, strict=True):
                assert self._host is not None
                self._copies.copy(self._host, held.entry.state.slot, self.pool, slot)
                self._copied_from[held] = held.entry.state.slot
                _lies_in(held, slot)
                self._index.move(held, Tier.DEVICE)

    def slots(self, num_rows_B: Iterable[int]) -> list[Slot]:
        """Room on the device for states of so many rows, from which others that are not in use have to go.

        What is not `put` in there is taken back at the next `release`.
        """
        slots = [self._slot(int(num_rows)) for num_rows in num_rows_B]
        self._lent.update(slots)
        self._copies.wait()  # what lay there may still be copied from
        # a state does not fill its slot, and what another user left there would go where it goes
        self.pool.clear([(slot.start, slot.size) for slot in slots])
        return slots

    def update(self, user_key: int, entry: StateEntry) -> None:
        """Another entry for the very state that is held of the user, which has grown in place or is known to hold more."""
        held = self._index.find(user_key)
        assert held is not None
        assert held.entry.state.slot is entry.state.slot
        if entry.state is not held.entry.state:
            self._free_copy(held)
        held.entry = entry

    def put(self, user_key: int, version: StateVersion, entry: StateEntry) -> None:
        """A state in a slot of its own (`slots`) in place of what was held of the user; pinned until `release`."""
        self._lent.remove(entry.state.slot)
        self._pin(self._index.put(user_key, version, entry, entry.state.slot.size * self.layout.row_bytes))

    def release(self) -> None:
        """The batch is over: nothing is in use, and the device holds no more than its budget."""
        for held in self._in_use:
            self._index.unpin(held)
        for slot in self._lent:
            self.pool.slots.free(slot)
        self._in_use.clear()
        self._lent.clear()
        if self.num_bytes > self.budget_bytes:
            with self._copies.to_host():
                while self.num_bytes > self.budget_bytes:
                    self._push_out()

    def drop_stale(self, user_key: int) -> None:
        """Drops a user's state because what it was made from is no longer so."""
        self._index.drop_stale(user_key)

    def forget(self, user_key: int) -> bool:
        """Drops everything held of a user and overwrites what any state has left in memory, in all tiers; whether any was held.

        Nothing may be in use.
        """
        is_held = self._index.forget(user_key)
        self.counters.forget += is_held
        # A state leaves rests where it moved out or had to go, in slots that no one may have used since. Copies may still read or
        # write there: the host waits for them. Kernels may too, on the device: clearing it is queued behind them.
        self._copies.finish()
        for pool in (self.pool, self._host):
            if pool is not None:
                pool.clear_rests()
        return is_held

    # -- what outlives it ---------------------------------------------------------------------------------------------

    def hottest(self, version: StateVersion) -> Iterator[tuple[HeldState, bool]]:
        """This version's states, and whether each one's user came back; those whose did first, and who would go last first.

        Nothing may be in use.
        """
        held = [one for tier in self._index.tiers for one in reversed(list(tier)) if one.version == version]
        for asked_again in (True, False):
            yield from ((one, asked_again) for one in held if one.asked_again == asked_again)

    def words(self, held: HeldState) -> Tensor:
        """Everything in the state's slot, [rows, words]: in host memory where it lies, or a copy from the device."""
        pool, slot = (self.pool if held.tier == Tier.DEVICE else self._host), held.entry.state.slot
        assert pool is not None
        self._copies.finish()
        return pool.words_NI[slot.start : slot.start + slot.size].cpu()

    def restore(
        self, user_key: int, version: StateVersion, entry: StateEntry, words_NI: Tensor, is_protected: bool
    ) -> bool:
        """Takes a kept state (`entry` with any slot) into host memory, if there is room and none of this version is held of the
        user. States of versions that are not served make room for it."""
        num_bytes, tier = len(words_NI) * self.layout.row_bytes, self._index.tiers[Tier.HOST]
        if self._host is None or tier.current_bytes + num_bytes > self.host_budget_bytes:
            return False
        if (held := self._index.find(user_key)) is not None:
            if held.version == version:
                return False
            self._index.drop_stale(user_key)
        if not self._make_room_in_host(len(words_NI)) or (slot := self._host_slot(self._host, len(words_NI))) is None:
            return False
        self._copies.finish()  # the slot's memory may still be read or written
        self._host.words_NI[slot.start : slot.start + slot.size].copy_(words_NI)
        entry = replace(entry, state=replace(entry.state, slot=slot))
        self._index.restore(user_key, version, entry, num_bytes, is_protected)
        return True

    # -- memory -------------------------------------------------------------------------------------------------------

    def _pin(self, held: HeldState) -> None:
        self._index.pin(held)
        self._in_use.append(held)

    def _slot(self, num_rows: int) -> Slot:
        """Its memory may be read by copies until the device has waited for them."""
        while (slot := self.pool.slots.allocate(num_rows)) is None:
            with self._copies.to_host():
                self._push_out()
        return slot

    def _push_out(self) -> None:
        """Whoever is first to go leaves the device, by a copy if host memory has none of it."""
        tier = self._index.tiers[Tier.DEVICE]
        held = tier.victim()
        assert held is not None  # there is room for a batch beside the budget
        if self._host is None or tier.is_outdated(held) or (there := self._copied_to(self._host, held)) is None:
            self._index.evict(held)
            return
        self.pool.slots.free(held.entry.state.slot)
        _lies_in(held, there)
        self._index.move(held, Tier.HOST)

    def _copied_to(self, host: HostPool, held: HeldState) -> Slot | None:
        """Where the state on the device has its copy from here on; None if there is no room for it."""
        slot = held.entry.state.slot
        if not self._make_room_in_host(slot.size):
            return None
        if (there := self._copied_from.pop(held, None)) is None and (there := self._host_slot(host, slot.size)):
            self._copies.copy(self.pool, slot, host, there)
        return there

    def _make_room_in_host(self, num_rows: int) -> bool:
        """Whether so much is within the budget there; others go for good for it, unless they are in use."""
        tier, num_bytes = self._index.tiers[Tier.HOST], num_rows * self.layout.row_bytes
        if num_bytes > self.host_budget_bytes:
            return False
        while tier.num_bytes + num_bytes > self.host_budget_bytes:
            if (victim := tier.victim()) is None:
                return False
            self._index.evict(victim)
        return True

    def _host_slot(self, host: HostPool, num_rows: int) -> Slot | None:
        """For what is within the budget; copies of what is on the device go for it.

        That is enough. Were it not, states would go too: an error here would be one of every batch from then on.
        """
        while (slot := host.slots.allocate(num_rows)) is None:
            if self._copied_from:
                self._free_copy(next(iter(self._copied_from)))
            elif victim := self._index.tiers[Tier.HOST].victim():
                self._index.evict(victim)
            else:
                return None
        return slot

    def _free_copy(self, held: HeldState) -> None:
        """Host memory holds nothing of a state on the device from here on."""
        if self._host is not None and (slot := self._copied_from.pop(held, None)) is not None:
            self._host.slots.free(slot)

    def _free(self, held: HeldState) -> None:
        self._free_copy(held)
        self._pool_of(held).slots.free(held.entry.state.slot)

    def _pool_of(self, held: HeldState) -> StatePool:
        pool = self.pool if held.tier == Tier.DEVICE else self._host
        assert pool is not None
        return pool


def _lies_in(held: HeldState, slot: Slot) -> None:
    held.entry = replace(held.entry, state=replace(held.entry.state, slot=slot))
