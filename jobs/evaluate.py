"""Scores the test split, beside the baselines: python -m jobs.evaluate --config configs/quickstart.yaml"""

from longer.config import Settings
from longer.runner import run_job
from longer.storage import Version
from longer.training.evaluate import evaluate
from longer.training.inputs import Inputs


def run(settings: Settings) -> Version:
    """Metrics and scores of the served checkpoint."""
    return evaluate(settings)


if __name__ == "__main__":
    run_job(__doc__, run, check=Inputs.served)
