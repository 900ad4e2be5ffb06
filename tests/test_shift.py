"""The test of a shift in mood: false alarms as asked for, live as in replay, what it finds and what it leaves alone."""

import json
import math
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from llmprod import corpora
from llmprod.news_monitoring import shift, simulate, streams, studies
from llmprod.news_monitoring.documents import DAY, NewsError

QUICK = shift.Settings(warmup=20, days=2, memory=200)


def quiet(streams: int, a_day: int, years: float, alike: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`simulate.quiet_days` of so many years and the warm-up."""
    return simulate.quiet_days(streams, a_day, round(365 * years) + 28, alike, seed)


def live(values: np.ndarray, days: np.ndarray, allowed: float, assumed: shift.Settings, **more) -> list:
    """A detector that saw them one by one, and its alerts."""
    detector = shift.Shift(assumed, allowed, **more)
    places = np.arange(len(days)) - np.searchsorted(days, days)
    times = DAY * (days + (places + 1) / 1000)
    return [detector, [detector.update(t, float(expit(v))) for t, v in zip(times, values, strict=True)]]


@pytest.mark.parametrize(("a_day", "alike"), [(4, 0.0), (4, 0.2), (20, 0.0), (20, 0.2)])
def test_two_hundred_quiet_years_raise_the_false_alarms_that_were_asked_for(a_day, alike):
    """Two a year: 400 are expected, with a standard deviation of 20; a fifth more or less is within the promise."""
    values, days = quiet(200, a_day, 1.0, alike)
    raised = shift.replay(values, days, np.array(2.0), shift.Settings())["raised"]
    assert 320 <= raised.sum() <= 480
    per_half_year = [part.sum() for part in np.array_split(raised[:, 28 * a_day :], 2, axis=1)]
    assert min(per_half_year) > 130, "as many soon after the warm-up as later"


def test_a_shift_for_the_worse_is_found_and_one_for_the_better_is_not():
    values, days = quiet(50, 20, 0.4, 0.1)
    begin = np.searchsorted(days, 100)
    moved = values.copy()
    moved[:, begin:] += 0.4
    found = shift.replay(moved, days, np.array(0.5), shift.Settings())["raised"]
    after = found[:, begin:].argmax(axis=1)
    assert found[:, begin:].any(axis=1).mean() >= 0.9
    assert np.median(after[after > 0]) < 200, "ten days of 20 documents"
    better = values.copy()
    better[:, begin:] -= 0.4
    assert shift.replay(better, days, np.array(0.5), shift.Settings())["raised"][:, begin:].sum() <= 1, "good news"


def test_documents_of_one_day_that_are_alike_do_not_raise_alarms():
    """Without its ratio the same test raises several times as many."""
    values, days = quiet(100, 40, 0.5, 0.4)
    asked = np.array(2.0)
    found = shift.replay(values, days, asked, shift.Settings())["raised"].sum()
    deaf = shift.replay(values, days, asked, shift.Settings(prior=1e9))["raised"].sum()
    assert found <= 1.3 * 100 * 2 * 0.5 < 3 * 100 * 2 * 0.5 < deaf


@settings(max_examples=20)  # each one is some 200 documents, three times
@given(st.integers(0, 10_000), st.sampled_from([0.5, 4.0, 40.0]))
def test_live_is_as_in_replay_and_survives_its_json(seed, allowed):
    values, days = quiet(1, 5, 0.1, 0.3, seed)
    values[0, 150:200] += 2
    found = shift.replay(values, days, np.array(allowed), QUICK)
    half = len(days) // 2
    first, alerts = live(values[0, :half], days[:half], allowed, QUICK)
    again = shift.Shift(QUICK, allowed).with_past(json.loads(json.dumps(asdict(first), allow_nan=False)))
    _, whole = live(values[0], days, allowed, QUICK)
    assert [alert is not None for alert in whole] == found["raised"][0].astype(bool).tolist()
    places = np.arange(len(days)) - np.searchsorted(days, days)
    times = DAY * (days + (places + 1) / 1000)
    alerts += [again.update(t, float(expit(v))) for t, v in zip(times[half:], values[0, half:], strict=True)]
    assert alerts == whole


def test_an_alert_says_what_a_reader_needs():
    values, days = quiet(1, 20, 0.3, 0.0, seed=1)
    values[0, 1200:1400] += 1.0
    _, alerts = live(values[0], days, 1.0, shift.Settings())
    (alert,) = filter(None, alerts)
    assert DAY * 58 < alert.since < DAY * 61, "the shift began on day 60"
    assert alert.said.endswith("standard deviations worse than its usual level; expected by chance once in 12 months")
    assert 0.6 < alert.severity < 1.8 and alert.share > alert.baseline
    assert alert.documents <= 100 and all(1180 <= document < 1400 for document, _ in alert.causes)


def test_a_lasting_shift_is_told_once_and_becomes_the_level():
    values, days = quiet(1, 20, 1.5, 0.0)
    values[0, 2000:] += 1.0
    detector, alerts = live(values[0], days, 0.2, replace(shift.Settings(), patience=500))
    assert sum(alert is not None for alert in alerts) == 1
    assert not detector.on and detector.state["mean"][0] == pytest.approx(1.0, abs=0.15)


def test_an_outlier_raises_nothing_and_a_warm_up_neither():
    assumed = replace(QUICK, warmup=50, days=10)
    values, days = quiet(1, 5, 0.1, 0.0)
    values[0, ::40] = logit(0.999)
    assert not any(live(values[0], days, 1.0, assumed)[1])
    detector, alerts = live(np.full(49, 5.0), np.arange(49), 100.0, assumed)
    assert not detector.ready and not any(alerts) and detector.limit() == math.inf


def test_no_date_makes_a_stream_older_than_it_is():
    """A first document of long ago: no end of the warm-up, and no lower threshold for years."""
    values, days = quiet(1, 20, 0.3, 0.0)
    dated, alerts = live(values[0], days, 1.0, shift.Settings())
    odd, odd_alerts = live(values[0], np.where(np.arange(len(days)) == 0, -10_000, days), 1.0, shift.Settings())
    assert dated.ready and odd.age == dated.age + 7
    assert odd.limit() == pytest.approx(dated.limit(), rel=0.02)
    assert sum(map(bool, odd_alerts)) == sum(map(bool, alerts))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5])
def test_a_stream_without_spread_is_quiet(value):
    detector, alerts = shift.Shift(QUICK, 10.0), []
    for number in range(400):
        alerts.append(detector.update(DAY * number / 10, value))
    assert detector.ready and not any(alerts)
    assert all(math.isfinite(x) for column in detector.state.values() for x in column)


def test_nonsense_is_refused():
    with pytest.raises(NewsError, match="not a probability"):
        shift.Shift(QUICK, 1.0).update(0.0, math.nan)
    with pytest.raises(NewsError, match="drift"):
        shift.Settings(drift=0)


@pytest.mark.parametrize("keys", [1, 6])
def test_keys_together_raise_the_false_alarms_that_were_asked_for(keys):
    """Two a year in 100 years: 200 are expected, with a standard deviation of 14."""
    values, days = quiet(1, 10, 0.2, 0.2)
    assert 1.6 <= simulate.quiet_years(values[0], days, keys, 100, allowed=2.0) <= 2.4


def test_the_parts_of_all_keys_are_three_quarters():
    """The last quarter is for the alarms of keys that are new."""
    assert shift.part(shift.WHOLE, 0) == 1
    for ready in (1, 7):
        others = [shift.part(f"topic: {k}", ready) for k in range(ready)]
        assert sum([shift.part(shift.WHOLE, ready), *others]) == pytest.approx(3 / 4)


def test_a_turn_that_comes_slowly_does_not_become_the_level():
    """Level and spread are those of before, as long as the score has not been at 0 again."""
    values, days = quiet(20, 20, 0.3, 0.0)
    values += 0.4 * np.clip((days - 40) / 40, 0, 1)
    state = shift.start(len(values))
    for number, column in enumerate(values.T):
        age = days[number]
        if number and age > days[number - 1]:
            state = shift.close_day(state, shift.Settings())
        limit = np.full(len(values), 1e3 if age >= 28 else math.inf)
        state, _ = shift.step(state, column, limit, shift.Settings(patience=10**9))
    assert np.median(state["score"]) > 50 and np.median(state["held_count"]) > 800
    assert abs(np.median(state["mean"])) < 0.1 < 0.2 < np.median(state["held_mean"])


def test_the_study_of_the_drift_counts_false_alarms_and_days(monkeypatch):
    monkeypatch.setattr(studies, "QUIET", [(4, 0.2, 2.0, 1, 20)])
    monkeypatch.setattr(studies, "TURNS", [(0.4, 0), (0.0, 0)])
    found = studies.simulated_shifts({"drift": 0.075, "seed": 0})["metrics"]
    assert 0.4 < found["false alarms, 4 a day, alike 0.2, 2.0 a year"] < 2
    assert 1 < found["days to the alarm, 0.4 in 0 days"] < 15
    assert found["days to the alarm, 0.0 in 0 days"] == math.inf, "most streams that do not turn raise none"


def test_what_was_held_back_is_learnt_like_the_rest():
    """Level and spread of the two parts together, without forgetting, are those of all documents (NumPy)."""
    first, second = np.random.default_rng(0).normal(0, 1, 150), np.random.default_rng(1).normal(0.5, 2, 70)
    state = shift.start() | {
        "count": np.array([150.0]),
        "mean": first[None].mean(1),
        "squares": first[None].var(1) * 150,
    }
    state |= {"held_count": np.array([70.0]), "held_mean": second[None].mean(1)}
    state |= {"held_squares": second[None].var(1) * 70}
    both = np.concatenate([first, second])
    learnt = shift.learn(state, np.array([True]), np.array([math.inf]))
    found = learnt["count"][0], learnt["mean"][0], learnt["squares"][0] / 220
    assert found == pytest.approx((220, both.mean(), both.var())) and learnt["held_count"][0] == 0
    assert shift.learn(state, np.array([False]), np.array([math.inf])) == state


def test_the_state_of_an_earlier_version_is_read():
    """Before what was held back had a place in it."""
    values, days = quiet(1, 5, 0.1, 0.3)
    saved = json.loads(json.dumps(asdict(live(values[0], days, 1.0, QUICK)[0])))
    saved["state"] = {name: value for name, value in saved["state"].items() if not name.startswith("held_")}
    saved["state"]["unknown"] = [0.0]
    again = shift.Shift(QUICK, 1.0).with_past(saved)
    assert set(again.state) == set(shift.start()) and again.update(DAY * 1000.0, 0.5) is None


def test_rules_on_days_raise_at_the_end_of_a_day():
    values, days = quiet(1, 10, 0.2, 0.0)
    values[0, 500:510] += 3
    assert np.flatnonzero(studies.by_day(values[0], days, 28, studies.naive)).tolist() == [509]
    values[0, 510:] += 1
    chart = partial(studies.ewma_chart, every=10_000)
    (first, *_) = np.flatnonzero(studies.by_day(values[0], days, 28, chart))
    assert days[first] in (50, 51, 52) and first % 10 == 9


def test_the_ewma_chart_keeps_to_its_false_alarms():
    noise = np.random.default_rng(0).standard_normal((100, 3653))
    a_year = np.mean([studies.ewma_chart(pd.Series(row), every=365.25).sum() for row in noise]) / 10
    assert 0.9 < a_year < 1.1


def test_streams_are_dated_and_in_order():
    """The newspaper's 4,080 headlines, one of them twice; articles without three old ones and those without a title."""
    headlines, articles = (streams.load(name) for name in streams.STREAMS)
    assert len(headlines) == 4079 and str(headlines["date"].iloc[0].date()) == "2020-01-02"
    assert headlines["text"].iloc[-1] == "Johnson is asking Santa for a Christmas recovery", "the newest is last"
    assert len(articles) == 3726 and str(articles["date"].iloc[0].date()) == "2016-12-02"
    for stream in (headlines, articles):
        assert stream["date"].is_monotonic_increasing and stream["text"].is_unique and (stream["text"] != "").all()
    assert streams.days(headlines["date"]).iloc[0] == 18263, "days since 1970-01-01"
    with pytest.raises(NewsError, match="business-headlines and news-articles"):
        streams.load("reuters-r8")


def test_news_of_a_weekend_belong_to_the_next_trading_day():
    close = pd.Series([100.0, 110.0, 121.0], pd.to_datetime(["2020-01-03", "2020-01-06", "2020-01-07"]))
    ratings = pd.Series([9.0, 1.0, 2.0, 3.0, 5.0], pd.to_datetime([f"2020-01-0{d}" for d in (3, 4, 5, 6, 7)]))
    table = streams.beside_market(ratings, close)
    assert table["rating"].tolist() == [2.0, 5.0], "the first day has no return"
    assert table["return"].to_numpy() == pytest.approx(np.log([1.1, 1.1]))


def test_lead_and_lag_finds_the_lag_that_was_planted_and_nothing_by_chance():
    random = np.random.default_rng(0)
    news, noise = random.standard_normal(300), random.standard_normal((2, 300))
    follows = pd.DataFrame({"rating": news, "return": np.roll(news, 2) + noise[0], "level": 0.0})
    found = streams.lead_and_lag(follows, range(-3, 4))
    assert found.index[found["p"] < 0.01].tolist() == [2] == found.index[found["low"] > 0].tolist()
    assert found.loc[2, "low"] < 0.7 < found.loc[2, "high"]
    alone = pd.DataFrame({"rating": news, "return": noise[1], "level": 0.0})
    assert (streams.lead_and_lag(alone, range(-3, 4))["p"] > 0.01).all()


def test_the_newspaper_has_the_dates_of_its_reports():
    """In order; the earthquake of 10 January is named in every issue of the week after, and hardly before."""
    paper = streams.newspaper()
    assert len(paper) == 19484 and paper["date"].is_monotonic_increasing
    assert paper["date"].min().day <= 2 and paper["date"].max() == pd.Timestamp("1998-01-31")
    named = paper["text"].str.contains("地震").groupby(paper["date"].dt.day).sum()
    assert named[:10].sum() < named[11:17].min() * 10 and named[11:17].min() > 0


def test_a_newspaper_is_read_by_models_of_reviews(monkeypatch):
    """The experiment, on few reviews and paragraphs, the worst of which stand at the end."""
    reviews = corpora.load("chinese-reviews").drop_duplicates("text").sample(frac=1, random_state=0)
    monkeypatch.setattr(corpora, "load", lambda name: reviews.groupby("label").head(260))
    good, bad = (reviews["text"][reviews["label"] == label].tail(300).tolist() for label in ("positive", "negative"))
    dates = pd.to_datetime("1998-01-01") + pd.to_timedelta(np.arange(360) // 12, unit="D")
    stream = pd.DataFrame({"text": [*good[:180], *(f"地震 {text}" for text in bad[:180])], "date": dates})
    monkeypatch.setattr(streams, "newspaper", lambda: stream)
    settings = {"model": "m3e-small", "max_length": 32, "epochs": 2, "batch_tokens": 256, "learning_rate": 3e-3}
    found = studies.chinese_news(
        {**settings, "method": "lora", "rows": 320, "warmup": 7, "false_alarms": 1.0, "seed": 0}
    )
    for reader in ("encoder", "bag of words"):
        scores = {
            name.removeprefix(f"{reader}, "): v for name, v in found["metrics"].items() if name.startswith(reader)
        }
        assert scores["accuracy on reviews"] > 0.6 and 16 <= scores["first alarm, day of January"] <= 22
        assert 2 * scores["causes that name the earthquake"] > scores["causes"] > 0 < scores["alarms"]
    assert len(found["curve"]["day"]) == 30 and found["curve"]["encoder"][0] > found["curve"]["encoder"][-1]
