"""Sentiment: rated texts against the published figures, lexicons, votes, heads that learn."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprod import data, models
from llmprod.financial_sentiment import multitask, sentiment, weak_labels

GOOD = "A splendid result, and the best year of the company."
BAD = "A terrible failure that ruined the firm and its workers."
PLAIN = "The meeting is on Tuesday in the usual room."


def test_ratings_give_the_published_figures():
    """Hutto & Gilbert 2014, table 4, NYT editorials: one person r .745 and F1 .65, VADER r .492 and F1 .55."""
    table, person = sentiment.load(), sentiment.rater_agreement()
    assert len(table) == 5190
    assert person["r"] == pytest.approx(0.745, abs=0.002)
    assert person["F1"] == pytest.approx(0.65, abs=0.005)
    assert person["r, left out of the mean"] == pytest.approx(0.714, abs=0.001)
    score = weak_labels.vader(table["text"])
    found = sentiment.scores(table, score, sentiment.to_class(score))
    assert found["r"] == pytest.approx(0.492, abs=0.015)  # the lexicon grew since
    assert found["weighted F1"] == pytest.approx(0.55, abs=0.005)
    assert found["macro-F1"] < 0.45  # the other average is not the paper's


def test_halves_share_no_text_and_groups_stay_together():
    table = sentiment.load()
    parts = sentiment.split_half(table, seed=1)
    assert sum(map(len, parts)) == len(table)
    assert not set(parts[0]["text"]) & set(parts[2]["text"])
    assert len(parts[2]) == pytest.approx(len(table) / 2, rel=0.03)
    assert set(parts[0]["group"]) & set(parts[2]["group"])
    grouped = sentiment.split_half(table, seed=1, by="group")
    assert not set(grouped[0]["group"]) & set(grouped[2]["group"])
    assert not parts[2].equals(sentiment.split_half(table, seed=2)[2])


def test_own_file_with_words_and_with_numbers(tmp_path):
    file = tmp_path / "mine.csv"
    pd.DataFrame({"text": [GOOD, BAD, PLAIN], "label": ["Positive", "negative", "neutral"]}).to_csv(file, index=False)
    assert sentiment.load(str(file))["rating"].tolist() == [1, -1, 0]
    pd.DataFrame({"body": [GOOD, BAD], "score": [2.5, -1]}).to_csv(file, index=False)
    table = sentiment.load(str(file), text_column="body", label_column="score")
    assert table["sentiment"].tolist() == [2, 0]
    file.write_bytes(f'text,label\n"{GOOD} Café", POSITIVE \n'.encode("latin-1"))
    assert sentiment.load(str(file), encoding="latin-1")["rating"].tolist() == [1]
    pd.DataFrame({"text": [GOOD, BAD], "label": ["good", "negative"]}).to_csv(file, index=False)
    with pytest.raises(sentiment.SentimentError, match=r"'good' is not a number. Ratings are"):
        sentiment.load(str(file))
    with pytest.raises(sentiment.SentimentError, match="part is 'blogs'"):
        sentiment.load(part="blogs")
    with pytest.raises(data.DataError, match=r"missing\.csv"):
        sentiment.load("missing.csv")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("0 1 2", "ratings go from 0 to 2, and should lie around 0.*Subtract what is neutral"),
        ("1 3 5", "ratings go from 1 to 5"),
        ("0 1 1", "ratings go from 0 to 1"),
        ("-1 one 1", "mine.csv, row 2: 'one' is not a number. Ratings are numbers around 0, or negative, neutral"),
        ("-1  1", "mine.csv: row 2 has no label"),
        *((f"-1 {missing} 1", "mine.csv: row 2 has no label") for missing in ("NA", "nan", "None", "null", "NaT")),
    ],
)
def test_ratings_that_do_not_lie_around_zero_are_refused(tmp_path, labels, message):
    rows = zip([GOOD, BAD, PLAIN], labels.split(" "), strict=True)
    (tmp_path / "mine.csv").write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows))
    with pytest.raises(sentiment.SentimentError, match=message):
        sentiment.load(str(tmp_path / "mine.csv"))


def test_a_text_with_two_ratings_is_refused_and_a_repeated_row_is_one(tmp_path):
    rows = [("good", 1), ("bad", -1), ("good", 1)]
    (tmp_path / "mine.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    assert sentiment.load(str(tmp_path / "mine.csv"))["text"].tolist() == ["good", "bad"]
    (tmp_path / "mine.csv").write_text("text,label\ngood,1\nbad,-1\nfine,1\nbad,-0.5\n")
    with pytest.raises(sentiment.SentimentError, match=r"mine\.csv: row 2 \(bad\) has other ratings elsewhere"):
        sentiment.load(str(tmp_path / "mine.csv"))


@given(st.lists(st.floats(-4, 4), min_size=1), st.floats(-1, 0), st.floats(0, 1))
def test_classes_follow_the_order_of_ratings(ratings, low, high):
    classes = sentiment.to_class(np.sort(ratings), low, high)
    assert (np.diff(classes) >= 0).all()
    assert set(classes) <= {0, 1, 2}


def test_lexicons_tell_good_from_bad():
    for lexicon in (weak_labels.vader, weak_labels.loughran_mcdonald):
        good, bad, plain = lexicon([GOOD, BAD, PLAIN])
        assert good > 0 > bad
        assert plain == 0


def test_lines_on_earnings():
    told = {
        "shr loss two cts vs profit seven cts net loss vs profit": 1,
        "shr profit cts vs loss three cts net profit vs loss": 0,
        "th qtr net shr cts vs cts net vs": 0,
        "champion products approves stock split": -1,
    }
    assert weak_labels.earnings_label(list(told)).tolist() == list(told.values())
    assert weak_labels.earnings("Operating loss narrowed to 3 mln") == 2
    assert weak_labels.earnings("Net sales fell by a tenth") == 0
    assert weak_labels.earnings("Costs rose") == 0
    assert weak_labels.earnings("Profit rose") == 2
    assert weak_labels.earnings("The board met") == weak_labels.NO_VOTE


def test_votes_combined_are_beliefs_that_follow_agreement():
    random = np.random.default_rng(0)
    truth = random.integers(0, 3, 600)
    names = {"good": 0.9, "fair": 0.75, "poor": 0.4}
    voted = pd.DataFrame(
        {n: np.where(random.random(600) < right, truth, random.integers(0, 3, 600)) for n, right in names.items()}
    )
    voted[random.random(voted.shape) < 0.2] = weak_labels.NO_VOTE
    beliefs = weak_labels.dawid_skene(voted)
    assert beliefs.shape == (600, 3)
    np.testing.assert_allclose(beliefs.sum(axis=1), 1)
    asked = voted["poor"] != weak_labels.NO_VOTE
    assert (beliefs.argmax(axis=1) == truth).mean() > 0.85
    assert (beliefs.argmax(axis=1) == truth)[asked].mean() > (voted["poor"] == truth)[asked].mean() + 0.2


def test_a_text_without_votes_gets_the_mean_belief():
    voted = pd.DataFrame({"one": [0, 2, -1, 0], "other": [0, 2, -1, 0]})
    beliefs = weak_labels.dawid_skene(voted)
    np.testing.assert_allclose(beliefs[2], beliefs[[0, 1, 3]].mean(axis=0), atol=1e-6)


@pytest.fixture(scope="module")
def learnt():
    """A number and a topic, learnt together from a few texts by two layers of the encoder."""
    texts = [f"{text} Item {i}." for i in range(12) for text in (GOOD, BAD)]
    feeling = multitask.Task("sentiment", texts, np.tile([2.0, -2.0], 12))
    themes = [f"{theme} number {i}" for i in range(12) for theme in ("wheat and corn harvest", "bank interest rates")]
    topic = multitask.Task("topic", themes, np.tile([0, 1], 12), ["grain", "interest"])
    losses = []
    predictor = multitask.train_multitask(
        [feeling, topic], layers=2, epochs=6, max_length=16, batch_tokens=128, learning_rate=1e-3,
        progress=False, log=lambda numbers, step: losses.append(numbers),
    )  # fmt: skip
    return predictor, losses


def test_two_heads_on_one_encoder_learn(learnt):
    predictor, losses = learnt
    assert len(predictor.model.encoder.encoder.layer) == predictor.model.config.num_hidden_layers == 2
    for task in ("sentiment", "topic"):
        values = [numbers[f"loss, {task}"] for numbers in losses if f"loss, {task}" in numbers]
        assert np.mean(values[-3:]) < 0.5 * np.mean(values[:3])
    said = multitask.predict(predictor, [GOOD, BAD, "corn and wheat"])
    assert said["sentiment"][0] > 0.5 and said["sentiment"][1] < -0.5
    assert said["topic"][2].argmax() == 0
    np.testing.assert_allclose(said["topic"].sum(axis=1), 1)
    assert multitask.class_names(predictor, "topic") == ["grain", "interest"]


def test_other_domains_help_through_heads_of_their_own():
    train = sentiment.split_half(sentiment.load(), seed=0)[0].head(20)
    assert [task.name for task in multitask.rating_tasks(train)] == ["sentiment"]
    tasks = multitask.rating_tasks(train, borrowed=15)
    assert [task.name for task in tasks] == ["sentiment", "tweets", "amazon", "movies"]
    assert [len(task.texts) for task in tasks] == [20, 15, 15, 15]
    borrowed = {text for task in tasks[1:] for text in task.texts}
    assert not borrowed & set(sentiment.split_half(sentiment.load(part="tweets"), seed=0)[2]["text"])
    assert "nyt" in [task.name for task in multitask.rating_tasks(train, borrowed=5, part="movies")]


def test_a_checkpoint_says_the_same(learnt, tmp_path):
    predictor, _ = learnt
    predictor.save(tmp_path / "model", "card")
    again = multitask.predict(models.Predictor.load(tmp_path / "model"), [GOOD, PLAIN])
    for task, value in multitask.predict(predictor, [GOOD, PLAIN]).items():
        np.testing.assert_allclose(again[task], value, atol=1e-5)


def test_calibration_gives_the_shares_that_it_promises():
    random = np.random.default_rng(0)
    ratings = random.normal(size=4000)
    negative = random.random(4000) < 1 / (1 + np.exp(2 * ratings + 0.5))
    fitted = sentiment.PlattScaling.fit(ratings[:2000], negative[:2000])
    probability = fitted(ratings[2000:])
    for low in (0.1, 0.4, 0.7):
        some = (probability > low) & (probability < low + 0.2)
        assert negative[2000:][some].mean() == pytest.approx(probability[some].mean(), abs=0.06)
    assert fitted.share == negative[:2000].mean()
    with pytest.raises(sentiment.SentimentError, match="negative texts and others"):
        sentiment.PlattScaling.fit(ratings, np.zeros(4000, dtype=bool))


def test_thresholds_undo_a_regression_to_the_mean():
    random = np.random.default_rng(0)
    truth = random.normal(0, 1, 800)
    shrunk = 0.3 * truth + 0.2
    classes = sentiment.to_class(truth)
    low, high = sentiment.fit_thresholds(shrunk, classes)
    chosen = sentiment.weighted_f1(classes, sentiment.to_class(shrunk, low, high))
    assert chosen > sentiment.weighted_f1(classes, sentiment.to_class(shrunk)) + 0.05
