"""LONGER without a history: what its width and depth give a candidate that has its features and nothing to attend to."""

from torch import Tensor

from longer.model.inputs import BatchTensors
from longer.model.longer import Longer


class NoHistory(Longer):
    """LONGER's own weights and layers, where a candidate sees itself alone; features are counted in the whole window."""

    @property
    def has_flat_pass(self) -> bool:
        return False

    def forward(self, batch: BatchTensors) -> Tensor:
        x_CD, features_CF = self.entered(batch)
        for block in self.layers:  # attention over one key is its value, wherever it is
            _, value_CHZ = block.keys_values(x_CD, batch.request_of_candidate_C * 0)
            x_CD = block.finish(x_CD, value_CHZ.flatten(1))
        return self.leave(x_CD, features_CF, batch.candidates["item_id"])
