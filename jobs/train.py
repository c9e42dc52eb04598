"""Trains the model and publishes its best checkpoint: python -m jobs.train --config configs/quickstart.yaml"""

from longer.config import Settings
from longer.runner import run_job
from longer.storage import Version
from longer.training.run import train


def run(settings: Settings) -> Version:
    """The checkpoint of the served requests."""
    return train(settings)


if __name__ == "__main__":
    run_job(__doc__, run)
