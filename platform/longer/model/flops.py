"""What a forward pass costs, and how many weights a layer has: formulas of arXiv 2505.04421 (eqs. 3 to 7), and LONGER's own sum.

A multiplication with its addition counts as two. What is elementwise is left out, as in the paper.
"""

from longer.model_settings import ModelSettings


def layer_flops(num_tokens: int, width: int) -> int:
    """Forward FLOPs of a Transformer layer over all its tokens: 24 L d^2 + 4 L^2 d."""
    return 24 * num_tokens * width**2 + 4 * num_tokens**2 * width


def layer_parameters(width: int) -> int:
    """Weights of a Transformer layer with biases and two norms: 12 d^2 + 13 d."""
    return 12 * width**2 + 13 * width


def merged_share(num_tokens: int, width: int, merge_size: int) -> float:
    """FLOPs of a layer after K adjacent tokens became one of K times the width, over those before: (6dK + L/K) / (6d + L)."""
    return (6 * width * merge_size + num_tokens / merge_size) / (6 * width + num_tokens)


def longer_flops(settings: ModelSettings, num_groups: int, num_queries: int, num_candidates: int) -> int:
    """Forward FLOPs of one request's encoder: `num_groups` whole groups, of which `num_queries` are queries, and candidates.

    From event vectors to what the last layer gives the candidates: the paper's encoding, InnerTrans, merge, cross-causal
    layer, self-causal layers. The last layer is computed for candidates only. With `queries: learnable` learned tokens
    count as queries here. Where user states exist, there is a slot for the partial newest group besides, computed
    whether it holds an event or not. Scores that the mask hides are counted, as in the paper.
    """
    d, width, merge_size = settings.event_width, settings.width, settings.merge_size
    num_globals, num_query_groups = settings.num_cls_tokens + settings.num_user_tokens, num_queries
    if settings.queries == "learnable":  # seen like user globals, in the first layer too
        num_globals, num_query_groups = num_globals + num_queries, 0
    if settings.is_appendable:
        num_groups, num_query_groups = num_groups + 1, num_query_groups + 1
    feed_forward = 4 * settings.feed_forward_ratio * width**2
    total = 2 * (num_groups + num_candidates) * width**2
    if settings.encoding == "paper":  # of each event and candidate, 2d to 2d to d
        total += 12 * (num_groups * merge_size + num_candidates) * d**2
    if settings.inner_transformer:
        total += num_groups * (16 * merge_size * d**2 + 4 * merge_size**2 * d) + num_candidates * (16 * d**2 + 4 * d)
    num_tokens = num_query_groups + num_globals
    for layer in range(settings.num_self_layers + 1):
        num_keys = num_groups + num_globals if layer == 0 else num_tokens
        total += 4 * num_keys * width**2
        if layer < settings.num_self_layers:
            total += num_tokens * (4 * width**2 + feed_forward) + 4 * num_tokens * num_keys * width
        total += num_candidates * (8 * width**2 + feed_forward + 4 * num_keys * width)
    return total


def longer_parameters(settings: ModelSettings) -> int:
    """Weights of LONGER's layers, InnerTrans and merge; embeddings, heads and interaction features are not counted."""
    d, width, ratio = settings.event_width, settings.width, settings.feed_forward_ratio
    layer = (
        layer_parameters(width) + (ratio - 4) * (2 * width + 1) * width
    )  # the paper's feed-forward layer is 4 times as wide
    inner = 8 * d**2 + 11 * d if settings.inner_transformer else 0
    return (settings.num_self_layers + 1) * layer + inner + width**2 + width
