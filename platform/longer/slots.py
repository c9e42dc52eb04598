"""Room for user states in one stretch of memory: slots whose freed room is always usable again. No torch.

Why not pages: attention and the candidates' binary search read a user's keys straight from the pool, in one contiguous range a
layer; pages would put a table look-up into every kernel and a gather into every read on a CPU. A state's size is known and small
(its windows are bounded), so a slot holds all of it, and one copy moves it between tiers.

Why this wastes nothing over time: the stretch is cut into equal slabs, a slab holds slots of one size, and an empty slab belongs
to no size. When no slab is free, a size with a slab's worth of free slots in several slabs moves the few slots of its emptiest
one into the others. So a request can only fail while each size has less than one slab of free slots: never more than a slab for
each size, and what is too little for a slot at the end of each slab, lie idle, however long the pool runs (`units_for`). Inside a
slot at most about a third is unused: sizes are a slab's halves, thirds, quarters, and so on, and nobody asks for less than the
smallest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Move = tuple[int, int, int]
"""From which unit, to which unit, and how many units."""


@dataclass(eq=False)
class Slot:
    """`size` units from `start` on. Compaction changes `start`: read it when the memory is used, not before."""

    start: int
    size: int
    _slab: "_Slab" = field(repr=False)


@dataclass(eq=False)
class _Slab:
    start: int
    slot_units: int
    slots: list[Slot | None]
    free: list[int]


class SlotAllocator:
    """Slots of at most `largest_units` in `num_units` of memory. `move` carries out moves: sources and targets never overlap."""

    def __init__(
        self, num_units: int, largest_units: int, smallest_units: int, move: Callable[[list[Move]], None]
    ) -> None:
        self._slab_units, self._move = 2 * largest_units, move
        self._free_slabs = [n * self._slab_units for n in reversed(range(num_units // self._slab_units))]
        self.num_units = len(self._free_slabs) * self._slab_units
        self.used_units = 0
        self.sizes = slot_sizes(self._slab_units, smallest_units)
        self._cut: dict[int, _Slab] = {}
        self._open: dict[int, dict[int, _Slab]] = {size: {} for size in self.sizes}
        self._left: set[int] = set()
        self._num_free = dict.fromkeys(self.sizes, 0)

    def size_for(self, num_units: int) -> int:
        """The size of the slot that `num_units` get."""
        return next(size for size in self.sizes if size >= num_units)

    def allocate(self, num_units: int) -> Slot | None:
        """A slot of at least `num_units`; None if something has to be freed first."""
        size = self.size_for(num_units)
        if not self._open[size] and not self._open_slab(size):
            return None
        slab = next(iter(self._open[size].values()))
        place = slab.free.pop()
        slot = Slot(slab.start + place * size, size, slab)
        self._take(slab, place, slot)
        self.used_units += size
        return slot

    def rests(self) -> list[tuple[int, int]]:
        """From which unit and how many units: what is free and was somebody's, or may have been, since the last call."""
        found = []
        for start in self._left:
            if (slab := self._cut.get(start)) is None:
                found.append((start, self._slab_units))
                continue
            found += [(start + place * slab.slot_units, slab.slot_units) for place in slab.free]
            if uncut := self._slab_units % slab.slot_units:
                found.append((start + self._slab_units - uncut, uncut))
        self._left.clear()
        return found

    def free(self, slot: Slot) -> None:
        """Gives the slot back; its memory may be another's from now on."""
        slab = slot._slab
        self.used_units -= slot.size
        self._leave(slab, slot)
        if len(slab.free) == len(slab.slots):
            self._close(slab)

    def _take(self, slab: _Slab, place: int, slot: Slot) -> None:
        slab.slots[place] = slot
        self._num_free[slab.slot_units] -= 1
        if not slab.free:
            del self._open[slab.slot_units][slab.start]

    def _leave(self, slab: _Slab, slot: Slot) -> None:
        place = (slot.start - slab.start) // slab.slot_units
        slab.slots[place] = None
        slab.free.append(place)
        self._left.add(slab.start)
        self._num_free[slab.slot_units] += 1
        self._open[slab.slot_units][slab.start] = slab

    def _open_slab(self, size: int) -> bool:
        if not self._free_slabs and not self._compact():
            return False
        num_slots = self._slab_units // size
        slab = _Slab(self._free_slabs.pop(), size, [None] * num_slots, list(reversed(range(num_slots))))
        self._cut[slab.start] = self._open[size][slab.start] = slab
        self._num_free[size] += num_slots
        return True

    def _close(self, slab: _Slab) -> None:
        del self._cut[slab.start], self._open[slab.slot_units][slab.start]
        self._num_free[slab.slot_units] -= len(slab.slots)
        self._free_slabs.append(slab.start)

    def _compact(self) -> bool:
        """Frees a slab whose slots have room in other slabs of their size, if there is one."""
        for size, slabs in self._open.items():
            if self._num_free[size] < self._slab_units // size:
                continue
            emptiest = max(slabs.values(), key=lambda slab: len(slab.free))
            others = [slab for slab in slabs.values() if slab is not emptiest]
            moves: list[Move] = []
            for slot in [slot for slot in emptiest.slots if slot is not None]:
                target = others[-1]
                place = target.free.pop()
                self._leave(emptiest, slot)
                moves.append((slot.start, target.start + place * size, size))
                slot.start, slot._slab = moves[-1][1], target
                self._take(target, place, slot)
                if not target.free:
                    others.pop()
            self._close(emptiest)
            self._move(moves)
            return True
        return False


def slot_sizes(slab_units: int, smallest_units: int) -> list[int]:
    """Sizes of which a slab holds 2, 3, 4, 5, 6, 8, 10, 12, 16, ... slots, ascending; none below `smallest_units`."""
    counts = [2, 3]
    while slab_units // counts[-1] >= smallest_units:
        octave = 1 << (counts[-1].bit_length())
        counts += [octave, octave * 5 // 4, octave * 3 // 2]
    sizes = {slab_units // count for count in counts}
    return sorted(size for size in sizes if size >= smallest_units) or [slab_units // 2]


def units_for(slot_units: int, slab_units: int, sizes: Sequence[int]) -> int:
    """Units of memory in which slots of `slot_units` in all always find room, whatever lies idle."""
    return (-(-slot_units // _usable_units(slab_units, sizes)) + len(sizes)) * slab_units


def _usable_units(slab_units: int, sizes: Sequence[int]) -> int:
    """Of a slab, whatever the size of its slots."""
    return min(slab_units // size * size for size in sizes)
