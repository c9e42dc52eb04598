"""Trains the model and publishes the best of its epochs: python -m jobs.train --config configs/quickstart.yaml

With --continue, trains the served checkpoint on the days that have come since, each tested before it is trained.
"""

from longer.config import Settings
from longer.errors import UserError
from longer.runner import run_job
from longer.section import same_for_workers
from longer.storage import Version
from longer.training.continuous import train_new_days
from longer.training.run import pin_tables, train

FLAGS = (
    ("from", "start from the weights of this checkpoint, a local folder or s3:// prefix", "PATH"),
    ("continue", "go on from the served checkpoint with the days that have come since"),
)


def run(settings: Settings, from_: str | None = None, continue_: bool = False) -> Version:
    """The checkpoint of the served requests."""
    if from_ and continue_:
        raise UserError("--from and --continue: the second goes on from the served checkpoint: drop one of them")
    return train_new_days(settings) if continue_ else train(settings, from_ and same_for_workers(from_))


if __name__ == "__main__":
    run_job(__doc__, run, flags=FLAGS, check=pin_tables)
