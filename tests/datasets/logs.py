"""Small logs in the real layout of each public one, with rows invented here, and what they should become."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

KUAIRAND_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n"
)


def movielens_100k(folder: Path) -> None:
    (folder / "u.data").write_text("7\t1\t5\t881250949\n7\t2\t3\t881250950\n9\t3\t1\t881250951\n")
    flags = {1: "0|0|0|1|1|1", 2: "0|1|0|0|0|0", 3: "1|0|0|0|0|0"}
    titles = {1: "A Toy (1995)", 2: "Été: un film (1996)", 3: "unknown"}
    lines = [f"{n}|{titles[n]}|01-Jan-1995||http://us.imdb.com/x|{flags[n]}{'|0' * 13}\n" for n in (1, 2, 3)]
    (folder / "u.item").write_text("".join(lines), encoding="latin-1")


def movielens_1m(folder: Path) -> None:
    (folder / "ratings.dat").write_text("7::1::5::881250949\n7::2::3::881250950\n9::3::1::881250951\n")
    movies = "1::A Toy (1995)::Animation|Children's|Comedy\n2::Été: un film (1996)::Action\n3::unknown::unknown\n"
    (folder / "movies.dat").write_text(movies, encoding="latin-1")


def movielens_25m(folder: Path) -> None:
    ratings = "userId,movieId,rating,timestamp\n7,1,5.0,881250949\n7,2,3.0,881250950\n9,3,1.0,881250951\n"
    (folder / "ratings.csv").write_text(ratings)
    movies = 'movieId,title,genres\n1,"Toy, A (1995)",Animation|Children\'s|Comedy\n2,Été (1996),Action\n3,x,unknown\n'
    (folder / "movies.csv").write_text(movies)
    (folder / "tags.csv").write_text("userId,movieId,tag,timestamp\n7,1,fun,881250949\n")


def kuairand(folder: Path) -> None:
    standard = "3,101,20220408,1600,1649408076860,1,0,0,0,0,0,1,17504,8743,0,0,0,0,1\n"
    later = "3,102,20220422,800,1650585600000,0,1,0,0,0,0,0,0,6540,0,0,0,0,0\n"
    random = "4,103,20220423,900,1650675600000,0,0,0,0,0,0,0,1385,20990,0,0,0,1,4\n"
    (folder / "log_standard_4_08_to_4_21_27k_part1.csv").write_text(KUAIRAND_HEADER + standard)
    (folder / "log_standard_4_22_to_5_08_27k_part1.csv").write_text(KUAIRAND_HEADER + later)
    (folder / "log_random_4_22_to_5_08_27k.csv").write_text(KUAIRAND_HEADER + random)
    (folder / "user_features_27k.csv").write_text("user_id,user_active_degree\n3,full_active\n")


def yambda_columns() -> dict[str, pa.Array]:
    return {
        "uid": pa.array([10, 10, 20], pa.uint32()),
        "timestamp": pa.array([0, 20_190_500, 25_999_995], pa.uint32()),
        "item_id": pa.array([6, 7, 8], pa.uint32()),
        "is_organic": pa.array([1, 0, 1], pa.uint8()),
    }


def yambda_listens(folder: Path) -> None:
    listens = {"played_ratio_pct": pa.array([100, 3, 150], pa.uint16()), "track_length_seconds": pa.array([200] * 3)}
    pq.write_table(pa.table({**yambda_columns(), **listens}), folder / "listens.parquet")
    pq.write_table(pa.table(yambda_columns()).slice(0, 1), folder / "likes.parquet")


def yambda_multi_event(folder: Path) -> None:
    yambda_listens(folder)  # beside it, as in the real folder
    kinds = pa.array(["listen", "like", "listen"]).dictionary_encode()
    played = {"played_ratio_pct": pa.array([100, None, 150]), "track_length_seconds": pa.array([200, None, 200])}
    pq.write_table(pa.table({**yambda_columns(), **played, "event_type": kinds}), folder / "multi_event.parquet")


def taobao(folder: Path) -> None:
    lines = ["1,2268318,2520377,pv,1511544070", "1,2333346,2520771,buy,1511561733", "2,4365585,2520377,fav,1511596146"]
    broken = ["3,1,1,pv,-1511596146", "3,1,1,pv,2122867355", "3,1,1,cart"]
    (folder / "UserBehavior.csv").write_text("\n".join([*lines, *broken]) + "\n")
