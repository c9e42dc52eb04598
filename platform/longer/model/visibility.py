"""Which token sees which: the one rule that training, serving with the cache and serving without it share (contract, section 5).

The paper's mask (arXiv 2505.04421, Eq. 10) hides candidates from the sequence; here candidates are also hidden from each other,
so that one user's history serves any number of them.
"""

from torch import Tensor

GROUP, GLOBAL, CANDIDATE = 0, 1, 2
"""Kinds of token. Their indices: a group's absolute index, any number for a global, a number of its own for each candidate."""


def visible(query_kind: Tensor | int, query_index: Tensor, key_kind: Tensor | int, key_index: Tensor) -> Tensor:
    """True where a query may attend to a key; arguments broadcast.

    A group token sees groups up to and including itself; a user global sees all groups and all globals; a candidate sees all
    groups, all globals and itself. Whether a key exists (padding, events after the request) is the caller's to add.
    """
    key_is_past_group = (key_kind == GROUP) & ((query_kind != GROUP) | (key_index <= query_index))
    key_is_global = (key_kind == GLOBAL) & (query_kind != GROUP)
    key_is_itself = (key_kind == CANDIDATE) & (query_kind == CANDIDATE) & (key_index == query_index)
    return key_is_past_group | key_is_global | key_is_itself
