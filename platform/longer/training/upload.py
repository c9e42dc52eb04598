"""A checkpoint on its way to storage, while training goes on."""

import errno
import os
import threading
from collections.abc import Callable
from typing import Any

from ray.train import Checkpoint

from longer.config import Settings
from longer.errors import UserError
from longer.files import remove_tree
from longer.training.checkpoints import Tensors, save_weights
from longer.training.trainer_state import TrainerState, save_trainer

_NO_ROOM = errno.ENOSPC, errno.EDQUOT


def upload_of(
    settings: Settings, run_path: str, storage: Any, weights: Tensors, moments: Tensors, state: TrainerState
) -> tuple[Callable[[Checkpoint, str], Checkpoint], threading.Event]:
    """A function for Ray's thread that writes these copies, and an event that tells that they are no longer needed.

    `storage` is Ray Train's, of the run. Ray calls the function again after some failures. Without room it is a UserError.
    """
    uploaded = threading.Event()

    def upload(_: Checkpoint, name: str) -> Checkpoint:
        try:
            remove_tree(f"{run_path}/{name}/trainer.json")  # of an earlier try: with it, the folder passes for whole
            save_weights(f"{run_path}/{name}", weights, settings.model, settings.event_schema, settings.train.tasks)
            save_trainer(f"{run_path}/{name}", moments, state)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise UserError(
                f"{run_path}/{name}: cannot be written ({os.strerror(error.errno)}): make room, then run the same command again: "
                "it goes on from the checkpoint before"
            ) from error
        finally:
            uploaded.set()
        return Checkpoint(storage.build_checkpoint_path_from_name(name), storage.storage_filesystem)

    return upload, uploaded
