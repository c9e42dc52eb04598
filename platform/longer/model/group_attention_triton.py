"""Triton kernels of attention inside groups: a tile is whole groups side by side, and a mask keeps them apart.

Imported on CUDA only (or under Triton's interpreter). M events of a tile, D width. Equal inputs give equal bits.
"""

import triton
import triton.language as tl


@triton.jit
def _weights(
    QKV, EXISTS, num_groups, scale,
    K: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Queries, keys and values of a tile, its events and which of them exist, and each event's weights of all others."""
    m_M, d_D = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    event_M = tl.program_id(0).to(tl.int64) * (GROUPS * K) + m_M
    inside_M = (m_M < GROUPS * K) & (event_M < num_groups * K)
    inside_MD = inside_M[:, None] & (d_D < D)[None, :]
    at_MD = event_M[:, None] * (3 * D) + d_D[None, :]
    q_MD = tl.load(QKV + at_MD, inside_MD, 0.0)
    k_MD = tl.load(QKV + at_MD + D, inside_MD, 0.0)
    v_MD = tl.load(QKV + at_MD + 2 * D, inside_MD, 0.0)
    exists_M = tl.load(EXISTS + event_M, inside_M, 0) != 0
    sees_MM = (m_M[:, None] // K == m_M[None, :] // K) & exists_M[None, :]
    score_MM = tl.dot(q_MD, tl.trans(k_MD), input_precision="ieee") * (scale * 1.4426950408889634)
    score_MM = tl.where(sees_MM, score_MM, float("-inf"))
    most_M = tl.max(score_MM, 1)
    weight_MM = tl.exp2(score_MM - tl.where(most_M == float("-inf"), 0.0, most_M)[:, None])
    sum_M = tl.sum(weight_MM, 1)
    return q_MD, k_MD, v_MD, event_M, inside_MD, weight_MM / tl.where(sum_M == 0.0, 1.0, sum_M)[:, None]


@triton.jit(do_not_specialize=["num_groups"])
def group_attention_kernel(
    QKV, EXISTS, OUT, num_groups, scale,
    K: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    _q_MD, _k_MD, v_MD, event_M, inside_MD, weight_MM = _weights(
        QKV, EXISTS, num_groups, scale, K, D, GROUPS, BLOCK_M, BLOCK_D
    )
    out_MD = tl.dot(weight_MM.to(v_MD.dtype), v_MD, input_precision="ieee")
    to_MD = event_M[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
    tl.store(OUT + to_MD, out_MD.to(OUT.dtype.element_ty), inside_MD)


@triton.jit
def group_attention_gradient_kernel(
    QKV, EXISTS, D_OUT, D_QKV, num_groups, scale,
    K: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    q_MD, k_MD, v_MD, event_M, inside_MD, weight_MM = _weights(
        QKV, EXISTS, num_groups, scale, K, D, GROUPS, BLOCK_M, BLOCK_D
    )
    d_D = tl.arange(0, BLOCK_D)
    d_out_MD = tl.load(D_OUT + event_M[:, None] * D + d_D[None, :], inside_MD, 0.0)
    d_v_MD = tl.dot(tl.trans(weight_MM.to(d_out_MD.dtype)), d_out_MD, input_precision="ieee")
    d_weight_MM = tl.dot(d_out_MD, tl.trans(v_MD), input_precision="ieee")
    d_score_MM = weight_MM * (d_weight_MM - tl.sum(weight_MM * d_weight_MM, 1)[:, None]) * scale
    d_score_MM = d_score_MM.to(q_MD.dtype)
    d_q_MD = tl.dot(d_score_MM, k_MD, input_precision="ieee")
    d_k_MD = tl.dot(tl.trans(d_score_MM), q_MD, input_precision="ieee")
    to_MD = event_M[:, None] * (3 * D) + d_D[None, :]
    tl.store(D_QKV + to_MD, d_q_MD.to(D_QKV.dtype.element_ty), inside_MD)
    tl.store(D_QKV + to_MD + D, d_k_MD.to(D_QKV.dtype.element_ty), inside_MD)
    tl.store(D_QKV + to_MD + 2 * D, d_v_MD.to(D_QKV.dtype.element_ty), inside_MD)
