"""What user states take: of a device, of Python, and which cards can keep them."""

import numpy as np
import torch

from longer.errors import UserError
from longer.model.pool import StatePool
from longer.model.state_layout import Precision, StateLayout
from longer.schema import EventSchema
from longer.windows import WindowRule

BATCH_USERS = 32
"""Most users whose states one batch uses: room for them stands beside the budget."""

_ENTRY_BYTES, _ARRAY_BYTES = 3_000, 190
"""Of a state's Python objects, and of each feature's array of its partial group besides the values: as measured over thousands of
states, and a quarter for the heap's gaps."""

_FP8_CAPABILITY = 8, 9
"""Of the first cards that compute with float8."""


def device_bytes_for(layout: StateLayout, budget_bytes: int) -> int:
    """What a budget takes of a device: room for the states of one batch stands beside it, and what may lie idle."""
    batch_states = 2 * BATCH_USERS  # a state that outgrows its slot has two for a moment
    return StatePool.bytes_for(layout, budget_bytes + batch_states * layout.largest_rows * layout.row_bytes)


def entry_bytes(schema: EventSchema, windows: WindowRule) -> int:
    """What Python keeps of a state in host memory: objects, a partial group's events, and a sum for each stride of the window."""
    num_arrays = 2 + len(schema.of_history("categorical")) + len(schema.of_history("numeric"))
    num_values = (1 + num_arrays) * (windows.merge_size - 1) + windows.history_groups // windows.stride_groups + 1
    return _ENTRY_BYTES + num_arrays * _ARRAY_BYTES + num_values * np.dtype(np.int64).itemsize


def check_card(precision: Precision, device: torch.device) -> None:
    """A UserError if the device cannot compute with states of this precision."""
    if precision != "fp8" or device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    if found < _FP8_CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(device), found
        raise UserError(
            f"state_precision: {name} has no fp8 (compute capability {major}.{minor}, it takes 8.9): set int8 or bf16"
        )
