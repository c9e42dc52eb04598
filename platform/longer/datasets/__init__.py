"""Importers: one module a log, each a `Source`."""

from longer.datasets import complete_journey, kuairand, movielens, taobao, yambda
from longer.datasets.generic import Generic
from longer.datasets.source import Source
from longer.table_settings import ImportSettings

_SOURCES: dict[str, Source] = {
    "complete_journey": complete_journey,
    "kuairand": kuairand,
    "movielens": movielens,
    "taobao": taobao,
    "yambda": yambda,
}


def source_of(settings: ImportSettings) -> Source:
    """The importer that the settings choose."""
    if settings.dataset == "generic":
        return Generic(settings.columns, settings.time_unit or "ms", section=settings.section)
    return _SOURCES[settings.dataset]
