"""The saved recommender: what it recommends, and what it says of odd requests."""

import numpy as np
import pytest

from llmprod.models import ModelError, Predictor
from llmprod.recommendation import catalogues, datasets, scorers
from llmprod.recommendation.catalogues import RecommendError
from llmprod.recommendation.served import ARRAYS, Recommender


@pytest.fixture(scope="module")
def recommender():
    """MovieLens' 400 most watched films."""
    catalogue = datasets.load()
    popular = catalogue.interactions["item"].value_counts().index[:400].to_numpy()
    number = {item: k for k, item in enumerate(popular)}
    log = catalogue.interactions[catalogue.interactions["item"].isin(number)]
    log = log.assign(item=log["item"].map(number))
    past = catalogues.matrix(log, (len(catalogue.users), len(popular)))
    items = catalogue.items.iloc[popular].rename(columns={"item": "id"})[["id", "title", "text"]].reset_index(drop=True)
    encoder = Predictor.pretrained("minilm", max_length=32, precision="fp32")
    vectors = encoder.embed(items["text"].tolist())
    return Recommender(items.astype(str), scorers.ease(past), vectors, np.asarray(past.sum(axis=0)).ravel(), encoder)


def id_of(recommender: Recommender, title: str) -> str:
    """The id of a film."""
    return recommender.items.loc[recommender.items["title"].str.startswith(title), "id"].iloc[0]


def test_who_likes_the_first_part_gets_the_second_and_the_reason(recommender):
    liked = [id_of(recommender, "Star Wars"), id_of(recommender, "Raiders of the Lost Ark")]
    found = recommender.recommend(liked, k=5)
    titles = [row["title"] for row in found]
    assert any(title.startswith(("Return of the Jedi", "Empire Strikes Back")) for title in titles)
    assert not {row["id"] for row in found} & set(liked) and all(set(row["because"]) <= {
        "Star Wars", "Raiders of the Lost Ark"} for row in found)  # fmt: skip
    assert recommender.recommend(liked * 2, k=5) == found, "liked twice is liked"


def test_a_wish_alone_and_with_what_was_liked(recommender):
    wish = recommender.recommend(wish="An animated film for children", k=10)
    genres = recommender.items.set_index("id")["text"]
    assert sum("Animation" in genres[row["id"]] or "Children" in genres[row["id"]] for row in wish) >= 8
    assert all(row["because"] == [] for row in wish)
    both = recommender.recommend([id_of(recommender, "Star Wars")], "An animated film for children", k=10)
    alone = recommender.recommend([id_of(recommender, "Star Wars")], k=10)
    assert {row["id"] for row in both} & {row["id"] for row in wish} and both != alone and both != wish
    assert recommender.recommend(k=1)[0]["title"] == "Star Wars", "without a word the most popular"


def test_odd_requests(recommender):
    with pytest.raises(RecommendError, match="no item 99999"):
        recommender.recommend(["99999"])
    everything = recommender.items["id"].tolist()
    assert len(recommender.recommend(everything[:-2], k=10)) == 2 and recommender.recommend(everything) == []


def test_it_is_read_as_it_was_saved(recommender, tmp_path):
    recommender.save(tmp_path / "saved", "# A card")
    again = Recommender.load(tmp_path / "saved")
    asked = {"liked": [id_of(recommender, "Fargo")], "wish": "A dark detective story"}
    assert [row["id"] for row in again.recommend(**asked)] == [row["id"] for row in recommender.recommend(**asked)]
    content = (tmp_path / "saved/items.json").read_text()
    (tmp_path / "saved/items.json").write_text(content.replace("Fargo", "Farewell"))
    with pytest.raises(ModelError, match=r"items\.json"):
        Recommender.load(tmp_path / "saved")
    (tmp_path / "saved/manifest.json").unlink()
    np.savez(tmp_path / "saved" / ARRAYS, weights=np.zeros((2, 2)), vectors=np.zeros((2, 3)), popularity=np.zeros(2))
    with pytest.raises(RecommendError, match="another catalogue"):
        Recommender.load(tmp_path / "saved")
    (tmp_path / "saved" / ARRAYS).unlink()
    with pytest.raises(RecommendError, match="no recommender"):
        Recommender.load(tmp_path / "saved")


@pytest.fixture(scope="module")
def unsealed(recommender, tmp_path_factory):
    """A saved recommender of two items without a manifest."""
    vectors, folder = recommender.vectors[:2], tmp_path_factory.mktemp("served") / "saved"
    few = Recommender(recommender.items.iloc[:2], np.zeros((2, 2)), vectors, np.ones(2), recommender.encoder)
    few.save(folder, "# A card")
    (folder / "manifest.json").unlink()
    assert len(Recommender.load(folder).items) == 2
    return folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (ARRAYS, b"", "arrays.npz can't be read"),
        (ARRAYS, b"PK\x03\x04 and no more", "arrays.npz can't be read"),
        (ARRAYS, {"vectors": np.zeros(2)}, "vectors has the shape"),
        (ARRAYS, {"vectors": np.zeros((2, 3))}, "vectors has the shape"),
        (ARRAYS, {"vectors": np.array(["a", "b"])}, "arrays.npz can't be read"),
        pytest.param("items.json", b"[" * 100_000, "items.json can't be read", id="deep"),
        ("items.json", b'[{"id": 1}, {"id": 2}]', "items.json can't be read"),
        ("items.json", b'[{"id": 1, "title": "A"}, {"title": "B"}]', "item 2 has no id"),
        ("items.json", b"[1, 2]", "items.json can't be read"),
    ],
)
def test_a_damaged_one_without_manifest_is_named(unsealed, name, content, message):
    before = (unsealed / name).read_bytes()
    try:
        if isinstance(content, bytes):
            (unsealed / name).write_bytes(content)
        else:
            np.savez(unsealed / name, **{"weights": np.zeros((2, 2)), "popularity": np.ones(2)} | content)
        with pytest.raises((RecommendError, ModelError), match=message):
            Recommender.load(unsealed)
    finally:
        (unsealed / name).write_bytes(before)
