"""Stable 63-bit keys for ids and categories: no vocabulary pass, the same on every machine, for ever.

Key 0 is reserved for a missing value. The keys are part of every checkpoint and of every table's bucketing: changing this
file makes all of them unreadable, which the golden test guards.
"""

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

Keys = npt.NDArray[np.int64]

_MASK_63_BITS = np.uint64(2**63 - 1)
_STEP, _ROUNDS, _LAST_SHIFT = 0x9E3779B97F4A7C15, ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)), 31


def hash_int64(values: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """The splitmix64 finaliser (Steele et al., OOPSLA 2014): a bijection of 64 bits, so distinct ints never collide."""
    x = values.astype(np.int64, copy=False).view(np.uint64) + np.uint64(_STEP)
    high = np.empty_like(x)  # in place from here: temporaries would cost more than the arithmetic
    for shift, factor in _ROUNDS:
        x ^= np.right_shift(x, np.uint64(shift), out=high)
        x *= np.uint64(factor)
    x ^= np.right_shift(x, np.uint64(_LAST_SHIFT), out=high)
    return x


def stable_keys(column: pa.Array | pa.ChunkedArray) -> Keys:
    """Keys of an int or string column, shape [rows]; nulls and empty strings become 0, everything else a positive int64.

    Of 63 bits: two ids share a key once in 2^63 pairs. Where that would mix up users, serving compares the ids too.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_dictionary(column.type):
        indices = column.indices.fill_null(0).to_numpy(zero_copy_only=False)
        keys = stable_keys(column.dictionary)[indices] if len(column.dictionary) else np.zeros(len(column), np.int64)
        return np.where(column.is_null().to_numpy(zero_copy_only=False), 0, keys)
    if pa.types.is_integer(column.type):
        present = column.fill_null(0) if column.null_count else column  # a request's few ids cost less than the call
        hashed = hash_int64(present.to_numpy(zero_copy_only=False).astype(np.int64, copy=False))
        missing = column.is_null().to_numpy(zero_copy_only=False) if column.null_count else slice(0)
    else:
        encoded = column.dictionary_encode()
        unique = encoded.dictionary.cast(pa.string()).to_numpy(zero_copy_only=False).astype(object)
        indices = encoded.indices.fill_null(0).to_numpy(zero_copy_only=False)
        of_unique = pd.util.hash_array(unique, categorize=False) if len(unique) else np.zeros(1, np.uint64)
        hashed = of_unique[indices]
        missing = pc.fill_null(pc.equal(column, ""), True).to_numpy(zero_copy_only=False)
    keys = np.maximum((hashed & _MASK_63_BITS).view(np.int64), 1)
    keys[missing] = 0
    return keys


def stable_key(value: int | str) -> int:
    """The key of one value: of an integer, in a hundredth of the time that a column of one takes."""
    if isinstance(value, str):
        return int(stable_keys(pa.array([value]))[0])
    x = (value + _STEP) % 2**64
    for shift, factor in _ROUNDS:
        x = (x ^ (x >> shift)) * factor % 2**64
    return max((x ^ (x >> _LAST_SHIFT)) % 2**63, 1)


def bucket_of(keys: Keys, num_buckets: int) -> npt.NDArray[np.int32]:
    """The hash bucket of each user key, in [0, num_buckets); high bits, so that it is independent of `key % table_rows`."""
    return ((keys >> np.int64(31)) % np.int64(num_buckets)).astype(np.int32)
