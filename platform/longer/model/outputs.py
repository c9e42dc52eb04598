"""From the model's outputs to scores. C candidates, T tasks."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from longer.training_settings import TaskSettings


def to_scores(outputs_CT: npt.NDArray, tasks: Sequence[TaskSettings]) -> dict[str, npt.NDArray[np.float32]]:
    """The model's outputs as users read them: probabilities of binary tasks, values of regression tasks; each [C]."""
    outputs = torch.from_numpy(np.asarray(outputs_CT, np.float32))
    return {
        task.name: (outputs[:, t].sigmoid() if task.kind == "binary" else outputs[:, t]).numpy()
        for t, task in enumerate(tasks)
    }
