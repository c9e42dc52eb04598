"""Slots of a pool: nothing overlaps, every unit is accounted for, and freed room is never lost to fragmentation."""

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from longer.slots import Move, Slot, SlotAllocator, slot_sizes, units_for

LARGEST, SMALLEST = 8, 3


def free_units(slots: SlotAllocator) -> int:
    return slots.num_units - slots.used_units


def most_idle_units(slots: SlotAllocator) -> int:
    """An allocation fails only while fewer units than this are free."""
    slab_units = 2 * slots.sizes[-1]
    usable = min(slab_units // size * size for size in slots.sizes)
    return slots.num_units - (slots.num_units // slab_units - len(slots.sizes)) * usable


class SlotsAgainstMemory(RuleBasedStateMachine):
    """Each slot's units hold its own number in a real array, which moves must carry along, and leave where they moved out of."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = np.zeros(24 * LARGEST, np.int64)  # more than may lie idle
        self.slots = SlotAllocator(len(self.memory), LARGEST, SMALLEST, self.move)
        self.held: dict[int, Slot] = {}
        self.serial = 0

    def move(self, moves: list[Move]) -> None:
        for source, target, size in moves:
            assert abs(source - target) >= size
            self.memory[target : target + size] = self.memory[source : source + size]

    @rule(num_units=st.integers(1, LARGEST))
    def allocate(self, num_units: int) -> None:
        slot = self.slots.allocate(num_units)
        if slot is None:
            assert free_units(self.slots) < most_idle_units(self.slots)
            return
        assert slot.size >= num_units
        self.serial += 1
        self.held[self.serial] = slot
        self.memory[slot.start : slot.start + slot.size] = self.serial

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.slots.free(self.held.pop(data.draw(st.sampled_from(sorted(self.held)))))

    @rule()
    def clear_rests(self) -> None:
        for start, num_units in self.slots.rests():
            self.memory[start : start + num_units] = 0
        in_slots = sum(slot.size for slot in self.held.values())
        assert np.count_nonzero(self.memory) == in_slots  # nothing is left of those who were freed, or moved out
        assert self.slots.rests() == []

    @invariant()
    def every_slot_has_its_own_memory(self) -> None:
        for number, slot in self.held.items():
            assert (self.memory[slot.start : slot.start + slot.size] == number).all()

    @invariant()
    def every_unit_is_accounted_for(self) -> None:
        assert self.slots.used_units == sum(slot.size for slot in self.held.values())
        if not self.held:
            assert free_units(self.slots) == self.slots.num_units == len(self.memory)


TestSlotsAgainstMemory = SlotsAgainstMemory.TestCase


@pytest.mark.parametrize(("largest", "smallest"), [(60, 5), (1700, 13), (7, 7), (1, 1)])
def test_a_slot_is_at_most_half_as_large_again_as_what_it_holds(largest: int, smallest: int) -> None:
    sizes = slot_sizes(2 * largest, smallest)
    assert sizes[-1] == largest
    assert sizes[0] >= smallest
    assert all(above <= below * 1.5 + 1 for below, above in pairwise(sizes))


@pytest.mark.parametrize("size", slot_sizes(2 * 1_700, 60))
def test_slots_of_one_size_find_the_room_that_was_counted_for_them_in_any_number_of_slabs(size: int) -> None:
    """All but one slot of as many other sizes as there are lie idle besides."""
    sizes = slot_sizes(2 * 1_700, 60)
    for num_slots in (0, 1, 100, 20_000):
        num_units = units_for(num_slots * size + sum(sizes), 2 * 1_700, sizes)
        slots = SlotAllocator(num_units, 1_700, 60, lambda moves: None)
        assert all(slots.allocate(other) for other in sizes)
        assert all(slots.allocate(size) for _ in range(num_slots))


def test_a_million_operations_lose_no_room() -> None:
    """Zipf sizes, as users' histories have, in a full pool of 10,000 slabs, whose ends add up: never more lies idle than the
    stated bound. Slow: a million."""
    rng, moved = random.Random(0), 0

    def count(moves: list[Move]) -> None:
        nonlocal moved
        moved += sum(size for _, _, size in moves)

    slots = SlotAllocator(20_000 * 1_700, 1_700, 60, count)
    held: list[Slot] = []
    used, asked, lowest = 0, 0, 1.0
    for operation in range(1_000_000):
        size = min(1_700, int(60 / (1 - rng.random())))
        asked += size
        while (slot := slots.allocate(size)) is None:
            assert free_units(slots) < most_idle_units(slots)
            place = rng.randrange(len(held))
            held[place], held[-1] = held[-1], held[place]
            victim = held.pop()
            used -= victim.size
            slots.free(victim)
            if operation > 500_000:
                lowest = min(lowest, slots.used_units / slots.num_units)
        held.append(slot)
        used += slot.size
        assert slots.used_units == used
    assert lowest >= 1 - most_idle_units(slots) / slots.num_units
    assert moved < asked  # compaction moves less than what is written anyway
    spans = sorted((slot.start, slot.start + slot.size) for slot in held)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    for slot in held:
        slots.free(slot)
    assert slots.used_units == 0


def test_what_is_given_back_in_a_full_pool_is_left_to_be_cleared() -> None:
    """Every slab is in use when a user of a full cache is forgotten."""
    slots = SlotAllocator(4 * LARGEST, LARGEST, SMALLEST, lambda moves: None)
    held = []
    while slot := slots.allocate(LARGEST):
        held.append(slot)
    assert slots.rests() == []
    slots.free(held[1])
    assert (held[1].start, LARGEST) in slots.rests()
    assert slots.rests() == []
