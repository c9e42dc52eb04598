"""Triton kernels of attention over shared context: one online softmax over a history's groups and a query's private keys.

Imported on CUDA only (or under Triton's interpreter): `longer.model.shared_attention` holds the contract and launches them. A tile
is BLOCK_M consecutive queries of one segment; scores are kept times log2(e), so that exponentials are powers of two. Everything is
summed in float32, in a fixed order, without atomics: equal inputs give equal bits.

M queries of a tile, N keys of a block, T tail keys, Z head width (padded to a power of two; columns past Z are zeros).
"""

import triton
import triton.language as tl


@triton.jit
def _online(score_M, value_MZ, max_M, sum_M, out_MZ):
    """The running softmax after one more key of each query."""
    new_M = tl.maximum(max_M, score_M)
    base_M = tl.where(new_M == float("-inf"), 0.0, new_M)
    old_M, weight_M = tl.exp2(max_M - base_M), tl.exp2(score_M - base_M)
    return new_M, sum_M * old_M + weight_M, out_MZ * old_M[:, None] + weight_M[:, None] * value_MZ


@triton.jit(do_not_specialize=["num_segments", "num_tiles"])
def tiles_kernel(
    OFFSETS, SEGMENT, FIRST, num_segments, num_tiles,
    SIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Segment and first query of each run of up to SIZE queries of one segment; what is left over begins behind the last query."""
    tile_T, s_S = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S)
    segment_T, start_T = tl.zeros([BLOCK_T], tl.int32), tl.zeros([BLOCK_T], tl.int32)
    before = 0
    for at in range(0, num_segments, BLOCK_S):
        exists_S = at + s_S < num_segments
        begin_S = tl.load(OFFSETS + at + s_S, exists_S, 0).to(tl.int32)
        end_S = tl.load(OFFSETS + at + s_S + 1, exists_S, 0).to(tl.int32)
        tiles_S = (end_S - begin_S + SIZE - 1) // SIZE
        ends_S = before + tl.cumsum(tiles_S, 0)
        is_before_TS = (ends_S[None, :] <= tile_T[:, None]) & exists_S[None, :]
        segment_T += tl.sum(is_before_TS.to(tl.int32), 1)
        start_T += tl.sum(tl.where(is_before_TS, tiles_S[None, :], 0), 1)
        before += tl.sum(tiles_S, 0)
    is_left_T = segment_T >= num_segments
    first_T = tl.load(OFFSETS + tl.minimum(segment_T, num_segments)).to(tl.int32)
    first_T += tl.where(is_left_T, 0, (tile_T - start_T) * SIZE)
    tl.store(SEGMENT + tile_T, tl.minimum(segment_T, num_segments - 1), tile_T < num_tiles)
    tl.store(FIRST + tile_T, first_T, tile_T < num_tiles)


@triton.jit(do_not_specialize=["num_rows", "tail_first", "own_first"])  # or it is compiled anew for one row, and for 16
def forward_kernel(
    Q, K, V, TAIL_K, TAIL_V, OWN_K, OWN_V, OUT, LSE, TILE_SEGMENT, TILE_FIRST, OFFSETS, KEY_BEGIN, NUM_VISIBLE, REQUEST, SEES,
    K_SCALE, V_SCALE,
    q_step, k_step, v_step, tail_k_step, tail_v_step, own_k_step, own_v_step, scale_step, num_rows, tail_first, own_first, scale,
    H: tl.constexpr, Z: tl.constexpr, T: tl.constexpr, HAS_OWN: tl.constexpr, HAS_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Z: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gathered values, and log2 of each query's sum of exponentials.

    Keys and values of the context may be of a shorter type than queries; with HAS_SCALE each head's is times a number of its own.
    """
    h, tile = tl.program_id(1), tl.program_id(0)
    segment, first = tl.load(TILE_SEGMENT + tile), tl.load(TILE_FIRST + tile)
    end = tl.load(OFFSETS + segment + 1)
    if first >= end:
        return
    p_M, z_Z = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_Z)
    exists_M, has_Z = p_M < end, z_Z < Z
    inside_MZ = exists_M[:, None] & has_Z[None, :]
    at_MZ = h * Z + z_Z[None, :]
    q_MZ = tl.load(Q + p_M[:, None] * q_step + at_MZ, inside_MZ, 0.0)
    visible_M = tl.load(NUM_VISIBLE + p_M, exists_M, 0).to(tl.int32)
    scale_log2 = scale * 1.4426950408889634

    max_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M, out_MZ = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_Z], tl.float32)
    if HAS_OWN and first >= own_first:
        own_M = p_M - own_first
        key_MZ = tl.load(OWN_K + own_M[:, None] * own_k_step + at_MZ, inside_MZ, 0.0).to(tl.float32)
        value_MZ = tl.load(OWN_V + own_M[:, None] * own_v_step + at_MZ, inside_MZ, 0.0).to(tl.float32)
        score_M = tl.sum(q_MZ.to(tl.float32) * key_MZ, 1) * scale_log2
        max_M, sum_M, out_MZ = _online(score_M, value_MZ, max_M, sum_M, out_MZ)
    if T > 0 and first >= tail_first:
        request_M = tl.load(REQUEST + p_M - tail_first, exists_M, 0)
        for t in tl.static_range(T):
            sees_M = tl.load(SEES + (p_M - tail_first) * T + t, exists_M, 0) != 0
            token_M = request_M * T + t
            key_MZ = tl.load(TAIL_K + token_M[:, None] * tail_k_step + at_MZ, inside_MZ, 0.0).to(tl.float32)
            value_MZ = tl.load(TAIL_V + token_M[:, None] * tail_v_step + at_MZ, inside_MZ, 0.0).to(tl.float32)
            score_M = tl.sum(q_MZ.to(tl.float32) * key_MZ, 1) * scale_log2
            score_M = tl.where(sees_M, score_M, float("-inf"))
            max_M, sum_M, out_MZ = _online(score_M, value_MZ, max_M, sum_M, out_MZ)

    key_begin = tl.load(KEY_BEGIN + segment % num_rows).to(tl.int64)
    K += key_begin * k_step + h * Z
    V += key_begin * v_step + h * Z
    K_SCALE += key_begin * scale_step + h
    V_SCALE += key_begin * scale_step + h
    num_keys = tl.max(visible_M)
    for start in range(0, num_keys, BLOCK_N):
        n_N = start + tl.arange(0, BLOCK_N)
        inside_NZ = (n_N < num_keys)[:, None] & has_Z[None, :]
        k_NZ = tl.load(K + n_N[:, None] * k_step + z_Z[None, :], inside_NZ, 0.0).to(q_MZ.dtype)
        v_NZ = tl.load(V + n_N[:, None] * v_step + z_Z[None, :], inside_NZ, 0.0).to(q_MZ.dtype)
        score_MN = tl.dot(q_MZ, tl.trans(k_NZ), input_precision=PRECISION) * scale_log2
        if HAS_SCALE:
            score_MN *= tl.load(K_SCALE + n_N * scale_step, n_N < num_keys, 0.0)[None, :]
        score_MN = tl.where(n_N[None, :] < visible_M[:, None], score_MN, float("-inf"))
        new_M = tl.maximum(max_M, tl.max(score_MN, 1))
        base_M = tl.where(new_M == float("-inf"), 0.0, new_M)
        weight_MN, old_M = tl.exp2(score_MN - base_M[:, None]), tl.exp2(max_M - base_M)
        sum_M = sum_M * old_M + tl.sum(weight_MN, 1)
        if HAS_SCALE:
            weight_MN *= tl.load(V_SCALE + n_N * scale_step, n_N < num_keys, 0.0)[None, :]
        out_MZ = tl.dot(weight_MN.to(v_NZ.dtype), v_NZ, out_MZ * old_M[:, None], input_precision=PRECISION)
        max_M = new_M

    nothing_M = sum_M == 0.0
    out_MZ = out_MZ / tl.where(nothing_M, 1.0, sum_M)[:, None]
    tl.store(OUT + p_M[:, None] * (H * Z) + at_MZ, out_MZ.to(OUT.dtype.element_ty), inside_MZ)
    tl.store(LSE + p_M * H + h, tl.where(nothing_M, 0.0, max_M + tl.log2(sum_M)), exists_M)


@triton.jit
def query_gradient_kernel(
    Q, K, V, TAIL_K, TAIL_V, OWN_K, OWN_V, OUT, LSE, TILE_SEGMENT, TILE_FIRST, OFFSETS, KEY_BEGIN, NUM_VISIBLE, REQUEST, SEES,
    D_OUT, DELTA, D_Q, D_OWN_K, D_OWN_V,
    q_step, k_step, v_step, tail_k_step, tail_v_step, own_k_step, own_v_step, num_rows, tail_first, own_first, scale,
    H: tl.constexpr, Z: tl.constexpr, T: tl.constexpr, HAS_OWN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Z: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and own keys and values; DELTA, the sum of each output times its gradient, for the other kernels."""
    h, tile = tl.program_id(1), tl.program_id(0)
    segment, first = tl.load(TILE_SEGMENT + tile), tl.load(TILE_FIRST + tile)
    end = tl.load(OFFSETS + segment + 1)
    if first >= end:
        return
    p_M, z_Z = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_Z)
    exists_M, has_Z = p_M < end, z_Z < Z
    inside_MZ = exists_M[:, None] & has_Z[None, :]
    at_MZ = h * Z + z_Z[None, :]
    flat_MZ = p_M[:, None] * (H * Z) + at_MZ
    q_MZ = tl.load(Q + p_M[:, None] * q_step + at_MZ, inside_MZ, 0.0)
    d_out_MZ = tl.load(D_OUT + flat_MZ, inside_MZ, 0.0)
    out_MZ = tl.load(OUT + flat_MZ, inside_MZ, 0.0)
    delta_M = tl.sum(d_out_MZ.to(tl.float32) * out_MZ.to(tl.float32), 1)
    tl.store(DELTA + p_M * H + h, delta_M, exists_M)
    lse_M = tl.load(LSE + p_M * H + h, exists_M, 0.0)
    visible_M = tl.load(NUM_VISIBLE + p_M, exists_M, 0).to(tl.int32)
    scale_log2 = scale * 1.4426950408889634

    d_q_MZ = tl.zeros([BLOCK_M, BLOCK_Z], tl.float32)
    if HAS_OWN and first >= own_first:
        own_M = p_M - own_first
        key_MZ = tl.load(OWN_K + own_M[:, None] * own_k_step + at_MZ, inside_MZ, 0.0).to(tl.float32)
        value_MZ = tl.load(OWN_V + own_M[:, None] * own_v_step + at_MZ, inside_MZ, 0.0).to(tl.float32)
        weight_M = tl.exp2(tl.sum(q_MZ.to(tl.float32) * key_MZ, 1) * scale_log2 - lse_M)
        d_score_M = weight_M * (tl.sum(d_out_MZ.to(tl.float32) * value_MZ, 1) - delta_M)
        d_q_MZ += d_score_M[:, None] * key_MZ
        d_key_MZ = d_score_M[:, None] * q_MZ.to(tl.float32) * scale
        d_value_MZ = weight_M[:, None] * d_out_MZ.to(tl.float32)
        own_MZ = own_M[:, None] * (H * Z) + at_MZ
        tl.store(D_OWN_K + own_MZ, d_key_MZ.to(D_OWN_K.dtype.element_ty), inside_MZ)
        tl.store(D_OWN_V + own_MZ, d_value_MZ.to(D_OWN_V.dtype.element_ty), inside_MZ)
    if T > 0 and first >= tail_first:
        request_M = tl.load(REQUEST + p_M - tail_first, exists_M, 0)
        for t in tl.static_range(T):
            sees_M = tl.load(SEES + (p_M - tail_first) * T + t, exists_M, 0) != 0
            token_M = request_M * T + t
            key_MZ = tl.load(TAIL_K + token_M[:, None] * tail_k_step + at_MZ, inside_MZ, 0.0).to(tl.float32)
            value_MZ = tl.load(TAIL_V + token_M[:, None] * tail_v_step + at_MZ, inside_MZ, 0.0).to(tl.float32)
            weight_M = tl.exp2(tl.sum(q_MZ.to(tl.float32) * key_MZ, 1) * scale_log2 - lse_M)
            weight_M = tl.where(sees_M, weight_M, 0.0)
            d_score_M = weight_M * (tl.sum(d_out_MZ.to(tl.float32) * value_MZ, 1) - delta_M)
            d_q_MZ += d_score_M[:, None] * key_MZ

    key_begin = tl.load(KEY_BEGIN + segment % num_rows).to(tl.int64)
    K += key_begin * k_step + h * Z
    V += key_begin * v_step + h * Z
    num_keys = tl.max(visible_M)
    for start in range(0, num_keys, BLOCK_N):
        n_N = start + tl.arange(0, BLOCK_N)
        inside_NZ = (n_N < num_keys)[:, None] & has_Z[None, :]
        k_NZ = tl.load(K + n_N[:, None] * k_step + z_Z[None, :], inside_NZ, 0.0)
        v_NZ = tl.load(V + n_N[:, None] * v_step + z_Z[None, :], inside_NZ, 0.0)
        score_MN = tl.dot(q_MZ, tl.trans(k_NZ), input_precision=PRECISION) * scale_log2
        seen_MN = n_N[None, :] < visible_M[:, None]
        weight_MN = tl.where(seen_MN, tl.exp2(score_MN - lse_M[:, None]), 0.0)
        d_weight_MN = tl.dot(d_out_MZ, tl.trans(v_NZ), input_precision=PRECISION)
        d_score_MN = weight_MN * (d_weight_MN - delta_M[:, None])
        d_q_MZ = tl.dot(d_score_MN.to(k_NZ.dtype), k_NZ, d_q_MZ, input_precision=PRECISION)
    tl.store(D_Q + flat_MZ, (d_q_MZ * scale).to(D_Q.dtype.element_ty), inside_MZ)


@triton.jit
def context_gradient_kernel(
    Q, K, V, LSE, OFFSETS, KEY_BEGIN, NUM_KEYS, NUM_VISIBLE, D_OUT, DELTA, D_K, D_V,
    q_step, k_step, v_step, num_rows, scale,
    H: tl.constexpr, Z: tl.constexpr, KINDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Z: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of a history's keys and values, summed over the queries of all its segments; zeros where none looks."""
    h, row, start = tl.program_id(1), tl.program_id(2), tl.program_id(0) * BLOCK_N
    num_keys = tl.load(NUM_KEYS + row)
    if start >= num_keys:
        return
    key_begin = tl.load(KEY_BEGIN + row).to(tl.int64)
    n_N, z_Z = start + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_Z)
    has_Z = z_Z < Z
    inside_NZ = (n_N < num_keys)[:, None] & has_Z[None, :]
    at_N = key_begin + n_N
    k_NZ = tl.load(K + at_N[:, None] * k_step + h * Z + z_Z[None, :], inside_NZ, 0.0)
    v_NZ = tl.load(V + at_N[:, None] * v_step + h * Z + z_Z[None, :], inside_NZ, 0.0)
    d_k_NZ, d_v_NZ = tl.zeros([BLOCK_N, BLOCK_Z], tl.float32), tl.zeros([BLOCK_N, BLOCK_Z], tl.float32)
    scale_log2 = scale * 1.4426950408889634
    for kind in tl.static_range(KINDS):
        segment = kind * num_rows + row
        end = tl.load(OFFSETS + segment + 1)
        for first in range(tl.load(OFFSETS + segment), end, BLOCK_M):
            p_M = first + tl.arange(0, BLOCK_M)
            exists_M = p_M < end
            visible_M = tl.load(NUM_VISIBLE + p_M, exists_M, 0).to(tl.int32)
            if tl.max(visible_M) > start:
                inside_MZ = exists_M[:, None] & has_Z[None, :]
                at_MZ = h * Z + z_Z[None, :]
                q_MZ = tl.load(Q + p_M[:, None] * q_step + at_MZ, inside_MZ, 0.0)
                d_out_MZ = tl.load(D_OUT + p_M[:, None] * (H * Z) + at_MZ, inside_MZ, 0.0)
                lse_M = tl.load(LSE + p_M * H + h, exists_M, 0.0)
                delta_M = tl.load(DELTA + p_M * H + h, exists_M, 0.0)
                score_NM = tl.dot(k_NZ, tl.trans(q_MZ), input_precision=PRECISION) * scale_log2
                seen_NM = n_N[:, None] < visible_M[None, :]
                weight_NM = tl.where(seen_NM, tl.exp2(score_NM - lse_M[None, :]), 0.0)
                d_v_NZ = tl.dot(weight_NM.to(d_out_MZ.dtype), d_out_MZ, d_v_NZ, input_precision=PRECISION)
                d_weight_NM = tl.dot(v_NZ, tl.trans(d_out_MZ), input_precision=PRECISION)
                d_score_NM = weight_NM * (d_weight_NM - delta_M[None, :])
                d_k_NZ = tl.dot(d_score_NM.to(q_MZ.dtype), q_MZ, d_k_NZ, input_precision=PRECISION)
    to_NZ = at_N[:, None] * (H * Z) + h * Z + z_Z[None, :]
    tl.store(D_K + to_NZ, (d_k_NZ * scale).to(D_K.dtype.element_ty), inside_NZ)
    tl.store(D_V + to_NZ, d_v_NZ.to(D_V.dtype.element_ty), inside_NZ)


@triton.jit
def tail_gradient_kernel(
    Q, TAIL_K, TAIL_V, LSE, REQUEST_OFFSETS, SEES, D_OUT, DELTA, D_TAIL_K, D_TAIL_V,
    q_step, tail_k_step, tail_v_step, num_requests, tail_first, scale,
    H: tl.constexpr, Z: tl.constexpr, T: tl.constexpr, RUNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_Z: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a request's tail keys and values, summed over the queries of all its runs."""
    request, h = tl.program_id(0), tl.program_id(1)
    t_T, z_Z = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_Z)
    has_Z = z_Z < Z
    inside_TZ = (t_T < T)[:, None] & has_Z[None, :]
    token_T = request * T + t_T
    k_TZ = tl.load(TAIL_K + token_T[:, None] * tail_k_step + h * Z + z_Z[None, :], inside_TZ, 0.0)
    v_TZ = tl.load(TAIL_V + token_T[:, None] * tail_v_step + h * Z + z_Z[None, :], inside_TZ, 0.0)
    d_k_TZ, d_v_TZ = tl.zeros([BLOCK_T, BLOCK_Z], tl.float32), tl.zeros([BLOCK_T, BLOCK_Z], tl.float32)
    scale_log2 = scale * 1.4426950408889634
    for run in tl.static_range(RUNS):
        OFFSETS = REQUEST_OFFSETS + run * (num_requests + 1) + request
        end = tl.load(OFFSETS + 1)
        for first in range(tl.load(OFFSETS), end, BLOCK_M):
            p_M = first + tl.arange(0, BLOCK_M)
            exists_M = p_M < end
            inside_MZ = exists_M[:, None] & has_Z[None, :]
            at_MZ = h * Z + z_Z[None, :]
            q_MZ = tl.load(Q + p_M[:, None] * q_step + at_MZ, inside_MZ, 0.0)
            d_out_MZ = tl.load(D_OUT + p_M[:, None] * (H * Z) + at_MZ, inside_MZ, 0.0)
            lse_M = tl.load(LSE + p_M * H + h, exists_M, 0.0)
            delta_M = tl.load(DELTA + p_M * H + h, exists_M, 0.0)
            is_TM = exists_M[None, :] & (t_T < T)[:, None]
            sees_TM = tl.load(SEES + (p_M - tail_first)[None, :] * T + t_T[:, None], is_TM, 0) != 0
            score_TM = tl.dot(k_TZ, tl.trans(q_MZ), input_precision=PRECISION) * scale_log2
            weight_TM = tl.where(sees_TM, tl.exp2(score_TM - lse_M[None, :]), 0.0)
            d_v_TZ = tl.dot(weight_TM.to(d_out_MZ.dtype), d_out_MZ, d_v_TZ, input_precision=PRECISION)
            d_weight_TM = tl.dot(v_TZ, tl.trans(d_out_MZ), input_precision=PRECISION)
            d_score_TM = weight_TM * (d_weight_TM - delta_M[None, :])
            d_k_TZ = tl.dot(d_score_TM.to(q_MZ.dtype), q_MZ, d_k_TZ, input_precision=PRECISION)
    to_TZ = (token_T[:, None] * H + h) * Z + z_Z[None, :]
    tl.store(D_TAIL_K + to_TZ, (d_k_TZ * scale).to(D_TAIL_K.dtype.element_ty), inside_TZ)
    tl.store(D_TAIL_V + to_TZ, d_v_TZ.to(D_TAIL_V.dtype.element_ty), inside_TZ)
