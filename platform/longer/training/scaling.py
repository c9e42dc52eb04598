"""Steps whose gradients are not finite change nothing, and are counted; a half-precision loss is scaled so that they are few."""

import torch
from torch import Tensor

_FIRST_SCALE, _MOST_SCALE, _STEPS_TO_GROW = 2.0**16, 2.0**24, 2_000


class Scaling:
    """What the loss is multiplied by before its gradients are taken, and how many steps were skipped.

    As torch's GradScaler: a step that is skipped halves the scale, many good ones in a row double it. Without `is_scaled`, for
    types that have float32's range, the scale stays 1. All of it lies on the device, so that nobody waits to know.
    """

    def __init__(self, device: torch.device, is_scaled: bool) -> None:
        self.is_scaled = is_scaled
        self.scale = torch.full((), _FIRST_SCALE if is_scaled else 1.0, device=device)
        self._num_good, self._num_skipped, self._num_in_row = torch.zeros(3, device=device).unbind()

    def update(self, is_finite: Tensor) -> None:
        """After every step."""
        skipped = 1.0 - is_finite.float()
        self._num_skipped += skipped
        self._num_in_row.add_(1).mul_(skipped)
        if self.is_scaled:
            self._num_good.add_(1).mul_(is_finite)
            grows = self._num_good >= _STEPS_TO_GROW
            self._num_good.mul_(~grows)
            self.scale.mul_(torch.where(is_finite, 1.0 + grows.float(), 0.5)).clamp_max_(_MOST_SCALE)

    def num_skipped(self) -> tuple[int, int]:
        """Steps skipped so far, and how many of them are the last ones; waits for the device."""
        total, in_row = torch.stack([self._num_skipped, self._num_in_row]).tolist()
        return int(total), int(in_row)

    def state(self) -> dict[str, float]:
        """What `restore` needs to go on in the same way."""
        names = "scale", "num_good", "num_skipped", "num_in_row"
        values = torch.stack([self.scale, self._num_good, self._num_skipped, self._num_in_row]).tolist()
        return dict(zip(names, values, strict=True))

    def restore(self, state: dict[str, float]) -> None:
        self.scale.fill_(state["scale"])
        self._num_good.fill_(state["num_good"])
        self._num_skipped.fill_(state["num_skipped"])
        self._num_in_row.fill_(state["num_in_row"])
