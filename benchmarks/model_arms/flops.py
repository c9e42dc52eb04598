"""The work that a training step cannot do without, counted.

d event width, D width.
"""

import numpy as np

from longer.model_settings import ModelSettings


def training_flops(settings: ModelSettings, lengths: np.ndarray, num_candidates: int) -> float:
    """Additions and multiplications of a training step's matrix products over real tokens: forward, and twice that for gradients.

    Events: InnerTrans and the merge. Layers: projections, attention over the keys each query sees, feed-forward; the last layer
    projects keys of groups and globals but gathers for candidates only. No embeddings, norms or optimizer.
    """
    d, width, merge_size, ratio = settings.event_width, settings.width, settings.merge_size, settings.feed_forward_ratio
    windows, num_users, num_globals = settings.windows, len(lengths), settings.num_cls_tokens + 1
    asked = windows.num_groups(lengths)
    in_window = asked - windows.query_start(lengths)
    candidates = num_users * num_candidates
    inner = 2 * d * 3 * d + 2 * d * d + 2 * 2 * d * 2 * d + 4 * merge_size * d if settings.inner_transformer else 0
    flops = float(lengths.sum() * inner + asked.sum() * 2 * width**2 + candidates * (inner + 2 * width**2))
    query, keys, rest = 2 * width**2, 4 * width**2, 2 * width**2 + 4 * ratio * width**2
    num_features = 2 * (4 + len(settings.count_events)) if settings.interactions else 0
    flops += candidates * (2 * num_features * width + 2 * width**2 + 2 * (width + num_features) * 2 * width + 4 * width)
    for layer in range(settings.num_self_layers + 1):
        groups = asked if layer == 0 else in_window
        own = num_globals * num_users + candidates
        reading = candidates if layer == settings.num_self_layers else in_window.sum() + own
        flops += (groups.sum() + own) * keys + reading * (query + rest)
        seen = ((groups + num_globals + 1) * num_candidates).sum()
        if layer < settings.num_self_layers:
            seen += ((groups + num_globals) * num_globals).sum() + (in_window * (groups - (in_window - 1) / 2)).sum()
        flops += 4 * width * seen
    return 3 * float(flops)
