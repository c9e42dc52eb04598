"""Triton kernels that find candidates in histories. Imported on CUDA only.

C candidates, M of a tile, N events of a block, F fields, V windows or query values, Q = C * F * V.
"""

import triton
import triton.language as tl


@triton.jit
def count_kernel(
    EVENTS, EVENT_BEGIN, KEYS, START, END, COUNTS, NEWEST, TILE_ROW, TILE_FIRST, OFFSETS, field_step, num_candidates,
    F: tl.constexpr, KEY_MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """For each candidate, field and window, the events of the window that have the candidate's key, and the newest's number or -1.

    Window v of candidate c holds the events number START[v, c] to END[c] of its history; window 0 is the longest.
    """
    row, first = tl.load(TILE_ROW + tl.program_id(0)), tl.load(TILE_FIRST + tl.program_id(0))
    field, window = tl.program_id(1), tl.program_id(2)
    stop = tl.load(OFFSETS + row + 1)
    if first >= stop:
        return
    c_M = first + tl.arange(0, BLOCK_M)
    exists_M = c_M < stop
    key_M = tl.load(KEYS + c_M * F + field, exists_M, 0) & KEY_MASK
    start_M = tl.load(START + window * num_candidates + c_M, exists_M, 2**31 - 1).to(tl.int32)
    end_M = tl.load(END + c_M, exists_M, 0).to(tl.int32)
    EVENTS += tl.load(EVENT_BEGIN + row) + field * field_step
    count_M, newest_M = tl.zeros([BLOCK_M], tl.int32), tl.full([BLOCK_M], -1, tl.int32)
    high = tl.max(end_M)
    for at in range(tl.min(start_M), high, BLOCK_N):
        n_N = at + tl.arange(0, BLOCK_N)
        key_N = tl.load(EVENTS + n_N, n_N < high, 0) & KEY_MASK
        in_window_MN = (n_N[None, :] >= start_M[:, None]) & (n_N[None, :] < end_M[:, None])
        found_MN = (key_N[None, :] == key_M[:, None]) & in_window_MN
        count_M += tl.sum(found_MN.to(tl.int32), 1)
        newest_M = tl.maximum(newest_M, tl.max(tl.where(found_MN, n_N[None, :], -1), 1))
    tl.store(COUNTS + (window * num_candidates + c_M) * F + field, count_M, exists_M)
    if window == 0:
        tl.store(NEWEST + c_M * F + field, newest_M, exists_M)


@triton.jit(do_not_specialize=["num_wanted", "num_pairs", "num_steps"])
def rank_kernel(
    PAIRS, ROW, WANTED, RANK, num_wanted, num_pairs, num_steps, F: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """How many of the sorted PAIRS[row, field] are smaller than each WANTED[c, field, v], by binary search."""
    q_Q = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists_Q = q_Q < num_wanted
    wanted_Q = tl.load(WANTED + q_Q, exists_Q, 0)
    row_Q = tl.load(ROW + q_Q // (F * V), exists_Q, 0)
    PAIRS_Q = PAIRS + (row_Q * F + q_Q // V % F) * num_pairs
    low_Q, high_Q = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32) + num_pairs
    for _ in range(num_steps):
        open_Q = exists_Q & (low_Q < high_Q)
        middle_Q = (low_Q + high_Q) // 2
        is_smaller_Q = tl.load(PAIRS_Q + middle_Q, open_Q, 0) < wanted_Q
        low_Q = tl.where(open_Q & is_smaller_Q, middle_Q + 1, low_Q)
        high_Q = tl.where(open_Q & ~is_smaller_Q, middle_Q, high_Q)
    tl.store(RANK + q_Q, low_Q.to(tl.int64), exists_Q)
