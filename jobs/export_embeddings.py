"""Writes the users' vectors, one row a user: python -m jobs.export_embeddings --config configs/quickstart.yaml [--users FILE]"""

from longer.config import Settings
from longer.runner import run_job
from longer.serving.batch import export_vectors
from longer.serving.batch_plan import check_named
from longer.storage import Version

SHORT = ["export_embeddings.users"]


def run(settings: Settings) -> Version:
    """The published vectors of the served checkpoint."""
    return export_vectors(settings)


if __name__ == "__main__":
    run_job(__doc__, run, short=SHORT, check=lambda settings: check_named(settings, settings.export_embeddings))
