"""Importer of MovieLens: 100K (u.data, u.item), 1M and 10M (ratings.dat, movies.dat), 20M, 25M and 32M (ratings.csv, movies.csv).

The layout is told from the files. An event is a rating: `rating` is its stars, `genres` the movie's, as in 'Action|Comedy'.
"""

from collections.abc import Iterator, Sequence

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from longer.datasets.readers import FileError, naming, text_batches
from longer.datasets.source import Part, find_files, log_parts, require_files, require_parts
from longer.files import read_bytes
from longer.table_settings import TimeUnit

PROVENANCE = (
    "MovieLens by GroupLens, University of Minnesota: ratings by volunteers, for research; "
    "its README's terms hold, among them no commercial use without permission and no redistribution."
)
TIME_UNIT: TimeUnit = "s"
_MOVIES = {"ratings.csv": "movies.csv", "ratings.dat": "movies.dat", "u.data": "u.item"}
"""The movies' file of each layout, newest layout first."""
_CSV = {"user_id": "userId", "item_id": "movieId", "rating": "rating", "event_ts": "timestamp"}
_TABS = ("user_id", "item_id", "rating", "event_ts")
_COLONS = ("user_id", "_1", "item_id", "_2", "rating", "_3", "event_ts")  # 'a::b' is three fields between single colons
_GENRES = (
    *(
        "unknown",
        "Action",
        "Adventure",
        "Animation",
        "Children's",
        "Comedy",
        "Crime",
        "Documentary",
        "Drama",
        "Fantasy",
    ),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)


def locate(source: str) -> list[Part]:
    ratings = next((name for name in _MOVIES if find_files(source, [name])), None)
    parts = log_parts(source, [ratings], require_files(source, _MOVIES[ratings])) if ratings else []
    return require_parts(source, parts, " or ".join(_MOVIES))


def read(part: Part, names: Sequence[str]) -> Iterator[pa.Table]:
    layout = part.path.rpartition("/")[2]
    columns = {name: name for name in _TABS} if layout != "ratings.csv" else _CSV
    header = {"u.data": _TABS, "ratings.dat": _COLONS}.get(layout)
    delimiter = {"u.data": "\t", "ratings.dat": ":"}.get(layout, ",")
    chosen = {name: column for name, column in columns.items() if name in names}
    movies = _movies(part.joined[0].path) if "genres" in names else None
    for batch in text_batches(part.path, chosen, header, delimiter, part.start, part.stop):
        batch = batch.append_column("action", pa.repeat("rating", len(batch)))
        if movies is not None:
            batch = batch.append_column(
                "genres", movies["genres"].take(pc.index_in(batch["item_id"], movies["item_id"]))
            )
        yield batch


def _movies(path: str) -> pa.Table:
    """`item_id`, as text, and `genres` of every movie; titles in the older files are Latin-1."""
    name = path.rpartition("/")[2]
    with naming(path):
        content = read_bytes(path)
    encoding = "utf-8" if name == "movies.csv" else "latin-1"
    delimiter = {"movies.csv": ",", "movies.dat": "::", "u.item": "|"}[name]
    lines = pa.BufferReader(content)
    try:
        rows = pd.read_csv(
            lines, sep=delimiter, header=0 if name == "movies.csv" else None, encoding=encoding, engine="python"
        )
        item_id = rows.iloc[:, 0].to_numpy("int64")
        genres = rows.iloc[:, 2] if name != "u.item" else _joined_flags(rows.iloc[:, -len(_GENRES) :])
    except (ValueError, IndexError) as error:
        raise FileError(path, f"not a movies file of MovieLens ({error})") from None
    return pa.table(
        {"item_id": pa.array(item_id).cast(pa.string()), "genres": pa.array(genres, pa.string(), from_pandas=True)}
    )


def _joined_flags(flags: pd.DataFrame) -> list[str]:
    """'Action|Comedy' from a 0 or 1 for each genre."""
    return ["|".join(g for g, flag in zip(_GENRES, row, strict=True) if flag) for row in flags.to_numpy(bool)]
