"""Surges: hand-worked CUSUMs, live against vectorised, planted surges and drift, hand-made operating curves."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprod.news_monitoring import simulate, surge
from llmprod.news_monitoring.documents import NewsError

KNOWN = 1e9  # a prior so strong that the baseline stays what it was said to be


def held_out(distance: float = 1.6, size: int = 20000, prior: float = 0.5, seed: int = 0):
    """Exactly calibrated scores: the posterior for one Gaussian a class; `distance` 1.6 is an AUC of 0.87."""
    random = np.random.default_rng(seed)
    negative = random.random(size) < prior
    x = random.normal(size=size) + distance * negative
    return 1 / (1 + (1 - prior) / prior * np.exp(distance**2 / 2 - distance * x)), negative


def streams(baseline: float, weeks: int, seed: int, per_week: int = 100, distance: float = 1.6, **more):
    """Quiet streams, and streams with a surge of three times the baseline share over 40 documents."""
    pool, random = held_out(distance), np.random.default_rng(seed)
    return [simulate.simulate(*pool, weeks, per_week, baseline, ratio, 40, random, **more) for ratio in (1, 3)]


# The detector


def test_cusum_by_hand():
    """Baseline 0.2 and three times that: a sure negative adds log 3, and a sure other takes log 2."""
    sure = surge.Settings(share=0.2, strength=KNOWN)
    cap = surge.arl(2.5, 0.2, sure)
    labels = np.array([[0.0, 1, 0, 1, 1, 1, 0]])
    # log(27 / 2) would be 2.60, above the cap
    expected = [0, math.log(3), math.log(3 / 2), math.log(9 / 2), 2.5, 2.5, 2.5 - math.log(2)]
    np.testing.assert_allclose(surge.cusum(labels, sure, cap=cap).score[0], expected, atol=1e-6)


def test_arl_by_hand_and_back():
    """Half of the documents negative, nine in ten in a surge of 1.8 times: log(5 / 3) nats for sure labels."""
    sure = surge.Settings(share=0.5, ratio=1.8, gain=1)
    assert surge.kl_drift(0.5, sure) == pytest.approx(math.log(5 / 3))
    assert surge.arl(2.0, 0.5, sure) == pytest.approx((math.exp(2) - 3) / math.log(5 / 3))
    assert surge.threshold_for_arl(np.inf, 0.5, sure) == np.inf
    assert surge.threshold_for_arl(1e-9, 0.5, sure) == 1.0 == sure.freeze
    assert surge.threshold_for_arl(1e-9, 0.5, replace(sure, freeze=0.0)) == math.log(1.8), (
        "more than one document can add"
    )


@given(st.floats(1.2, 30), st.floats(0.001, 0.9))
def test_threshold_for_arl_is_the_inverse_of_arl(score, share):
    assumed = surge.Settings(share=0.2)
    assert surge.threshold_for_arl(surge.arl(score, share, assumed), share, assumed) == pytest.approx(score, rel=1e-6)


def test_one_threshold_keeps_to_the_same_false_alarms_whatever_the_share():
    """By a height in nats a topic of 30 % has seven times as many as one of 5 %."""
    alarms, by_height = {}, {}
    for share in (0.05, 0.1, 0.3):
        quiet, planted = streams(share, 300, seed=2, per_week=200, history=200)
        assumed = surge.Settings(share=share)
        paths = [surge.cusum(s.scores, assumed) for s in (quiet, planted)]
        played = simulate.outcomes(*paths, planted.starts, 40, np.array([115.0]), skip=200)
        alarms[share] = float(200 * played.rates(np.ones(600))[0])
        crossings = paths[0].score[:, 200:] >= 2.5
        by_height[share] = (crossings[:, 1:] & ~crossings[:, :-1]).sum(axis=1).mean()
    assert max(alarms.values()) < 2 * min(alarms.values()) and 0.5 < np.mean(list(alarms.values())) < 2, alarms
    assert by_height[0.3] > 4 * by_height[0.05], by_height


@pytest.mark.parametrize(
    ("probability", "more", "ratio"),
    [
        (0.8, {}, 2.8 / 1.6),  # likelihood ratio 4: (0.6 · 4 + 0.4) / (0.2 · 4 + 0.8)
        (0.5, {"prior": 0.2}, 2.8 / 1.6),  # the same evidence from a model that was trained at another share
        (0.9 / 1.1, {}, 0.62 / 0.34),  # a label with sensitivity 0.9 and specificity 0.8, as a calibrated probability
        (0.1 / 0.9, {}, 0.38 / 0.66),
        (1.0, {"share": 0.5}, 0.95 / 0.5),  # the raised share is 0.95 at most
    ],
)
def test_what_a_document_adds_by_hand(probability, more, ratio):
    assumed = surge.Settings(**{"share": 0.2, "strength": KNOWN} | more)
    _, added = surge.step(surge.start(assumed), np.array([probability]), assumed)
    assert added[0] == pytest.approx(math.log(ratio))


def test_documents_speak_against_a_surge_without_one_and_for_it_in_one():
    """Mean increments: minus and plus a Kullback-Leibler divergence, which sure labels make largest."""
    random = np.random.default_rng(0)
    for share in (0.1, 0.2, 0.3):
        assumed = surge.Settings(share=share, strength=KNOWN)
        found = {}
        for raised in (share, 3 * share):
            truth = random.random(40000) < raised
            pool, negative = held_out()
            drawn = np.where(truth, random.choice(pool[negative], 40000), random.choice(pool[~negative], 40000))
            many = surge.start(assumed, 40000)
            for name, values in (("soft", drawn), ("sure", truth.astype(float))):
                found[name, raised] = surge.step(many, values, assumed)[1].mean()
        assert found["sure", share] < found["soft", share] < -0.02
        assert found["sure", 3 * share] > found["soft", 3 * share] > 0.02


def stream_of_documents(longest: int = 40):
    probability = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 0.9, 0.95]))
    return st.lists(st.tuples(st.floats(0, 2e9), probability), min_size=1, max_size=longest)


assumptions = st.builds(
    surge.Settings,
    share=st.floats(0.01, 0.6),
    strength=st.floats(1, 100),
    half_life=st.floats(5, 500),
    freeze=st.floats(0, 3),
    patience=st.integers(1, 20),
)


@settings(max_examples=50)
@given(stream_of_documents(), assumptions, st.floats(0.3, 400))
def test_live_equals_vectorised_exactly(documents, assumed, threshold):
    """Together with other streams, so that the number of streams makes no difference either."""
    _, probabilities = np.array(documents).T
    several = np.stack([probabilities, 1 - probabilities, np.roll(probabilities, 1)])
    path = surge.cusum(several, assumed, threshold)
    live = surge.Cusum(assumed, threshold)
    alerts, scores = [], []
    for time, probability in documents:
        alerts.append(live.update(time, probability) is not None)
        scores.append(live.state["score"][0])
    assert scores == path.score[0].tolist()
    share_of_limit = path.score[:1] / surge.threshold_for_arl(threshold, path.baseline[:1], assumed)
    quiet = simulate.outcomes(share_of_limit, share_of_limit, np.array([0]), 1, np.array([1.0]))
    assert quiet.false[0, 0] == sum(alerts)


@settings(max_examples=50)
@given(stream_of_documents(), assumptions, st.integers(0, 40))
def test_the_state_survives_json_at_any_point(documents, assumed, point):
    whole, stopped = surge.Cusum(assumed, 1.0), surge.Cusum(assumed, 1.0)
    for number, (time, probability) in enumerate(documents):
        if number == point:
            stopped = surge.Cusum(assumed, 1.0).with_past(json.loads(json.dumps(asdict(stopped), allow_nan=False)))
        assert whole.update(time, probability, f"d{number}") == stopped.update(time, probability, f"d{number}")
    assert asdict(whole) == asdict(stopped)


def test_the_alert_says_since_when_and_because_of_what():
    assumed = surge.Settings(share=0.2, strength=KNOWN)
    live = surge.Cusum(assumed, threshold=float(surge.arl(3.0, 0.2, assumed)), keep=2)
    for number, probability in enumerate([0.99, 0.01, 0.01, 0.02]):
        assert live.update(100 + number, probability, f"quiet {number}") is None
    assert live.since is None and live.causes == []
    shown = [live.update(200 + n, p, f"surge {n}") for n, p in enumerate([0.9, 0.3, 0.999, 0.6, 0.99, 0.95])]
    alert = next(filter(None, shown))
    assert shown.count(None) == 5 and live.on
    assert live.state["score"] == pytest.approx([3.0]), "the threshold is the cap"
    assert alert.since == 200, "the first document after the statistic was last 0"
    assert alert.time == 199 + alert.documents
    assert [document for document, _ in alert.causes] == ["surge 2", "surge 4"]
    assert alert.baseline == pytest.approx(0.2)
    # q1 = 0.6, and likelihood ratios p / (1 - p)
    documents = [0.9, 0.3, 0.999, 0.6, 0.99, 0.95][: alert.documents]
    terms = [math.log((0.6 * p + 0.4 * (1 - p)) / (0.2 * p + 0.8 * (1 - p))) for p in documents]
    assert alert.evidence == pytest.approx(sum(terms)) and sum(terms) >= 3
    assert alert.causes[0][1] == pytest.approx(max(terms))
    assert alert.severity == pytest.approx(alert.share / alert.baseline) and alert.severity > 2


@settings(max_examples=50)
@given(stream_of_documents(), st.lists(st.floats(0.3, 400), min_size=1, max_size=3))
def test_one_statistic_gives_the_alarms_under_every_cap(documents, thresholds):
    """Documents that raise an alarm in a CUSUM with a cap at the threshold, by two ways."""
    assumed = surge.Settings(share=0.2, strength=KNOWN)
    scores = np.array([[min(p, 0.999) for _, p in documents]])  # a certain one adds the lowest limit: a tie
    free = surge.cusum(scores, assumed)
    quiet, thresholds = (free, free, np.array([0]), 1), np.unique(thresholds)
    swept = simulate.outcomes(*quiet, thresholds * (1 - 1e-9), release=0.5).false[0]
    for threshold, alarms in zip(thresholds, swept, strict=True):
        live = surge.Cusum(assumed, threshold)
        assert alarms == sum(live.update(0, p) is not None for p in scores[0])


def test_severity_is_about_the_planted_ratio():
    """A surge that is known from its first document: nothing is selected, so that nothing is biased by that."""
    random, (pool, negative) = np.random.default_rng(0), held_out()
    assumed, shares = surge.Settings(share=0.2, strength=KNOWN), []
    for raised in (0.4, 0.6, 0.8):
        truth = random.random((300, 60)) < raised
        drawn = np.where(truth, random.choice(pool[negative], truth.shape), random.choice(pool[~negative], truth.shape))
        state = surge.start(assumed, 300) | {"score": np.full(300, 50.0)}
        for column in drawn.T.copy():
            state, _ = surge.step(state, column, assumed)
        shares.append(state["recent"].mean())
    np.testing.assert_allclose(shares, [0.4, 0.6, 0.8], atol=0.035)


def test_an_alarm_stays_on_until_the_lower_level():
    statistic = [0.0, 3, 2, 3, 1.4, 3, 1, 3, 3, 3]

    def raised(release):
        on = [False]
        for value in statistic:
            on.append(bool(surge.hysteresis(on[-1], value, 3.0, release)))
        return [i for i in range(len(statistic)) if on[i + 1] and not on[i]]

    assert raised(release=1.0) == [1, 3, 5, 7]
    assert raised(release=0.5) == [1, 5, 7], "2 is not below half of 3, but 1.4 is"


def test_a_surge_is_not_learned_and_a_new_level_is():
    assumed = surge.Settings(share=0.2, gain=1, freeze=2.0, patience=100)
    before = surge.Cusum(assumed, 150.0)
    random = np.random.default_rng(0)
    for number, label in enumerate(random.random(300) < 0.2):
        before.update(number, float(label))
    start = before.state["baseline"][0]
    for number in range(60):
        before.update(number, 1.0)
    assert before.on and before.state["baseline"][0] < start + 0.03
    for patience, least, most in ((100, 0.6, 1), (10**6, 0, 0.25)):
        lasting = surge.Cusum(surge.Settings(share=0.2, gain=1, patience=patience), 150.0)
        for number in range(600):
            lasting.update(number, float(number % 10 > 0))
        assert least < lasting.state["baseline"][0] < most, "a surge without an end is the new baseline"


def test_half_of_the_past_is_forgotten_after_the_half_life():
    """Sure labels: many negatives, then 50 others, by which half of what was counted is left."""
    assumed = surge.Settings(share=0.2, gain=1, half_life=50, freeze=math.inf)
    state, counted = surge.start(assumed), []
    for label in [1.0] * 1000 + [0.0] * 50:
        state, _ = surge.step(state, np.array([label]), assumed)
        counted.append((state["negatives"][0], state["counts"][0]))
    most = 1 / (1 - 0.5 ** (1 / 50))
    np.testing.assert_allclose(counted[999], [most, most], rtol=1e-5)
    np.testing.assert_allclose(counted[-1], [most / 2, most], rtol=1e-5)


def test_the_baseline_finds_the_share():
    """From a wrong prior, and from probabilities of a model that was trained at another share."""
    assumed = surge.Settings(share=0.1, half_life=5000)
    quiet = simulate.simulate(*held_out(), 60, 3000, 0.3, 1, 5, np.random.default_rng(0))
    assert surge.cusum(quiet.scores, assumed).baseline[:, -1].mean() == pytest.approx(0.3, abs=0.02)


def test_what_cannot_be_used_is_named():
    with pytest.raises(NewsError, match="ratio"):
        surge.Settings(share=0.2, ratio=1.0)
    live = surge.Cusum(surge.Settings(share=0.2), threshold=4.0)
    for wrong in (math.nan, -0.1, 1.1):
        with pytest.raises(NewsError, match="probability"):
            live.update(0, wrong)
    assert live.seen == 0


def test_what_it_is_compared_with_equals_its_definition():
    values = np.random.default_rng(0).random((3, 50))
    mean, z, smooth = simulate.rolling_mean(values, 5), simulate.z_score(values, 5, 20), simulate.ewma(values, 0.2, 0.5)
    assert np.isneginf(mean[:, :4]).all() and np.isfinite(mean[:, 4:]).all()
    assert np.isneginf(z[:, :24]).all() and np.isfinite(z[:, 24:]).all()
    level = 0.5
    for i in range(50):
        level = 0.2 * values[1, i] + 0.8 * level
        assert smooth[1, i] == pytest.approx(level - 0.5)
        if i >= 24:
            new, past = values[1, i - 4 : i + 1], values[1, i - 24 : i - 4]
            assert mean[1, i] == pytest.approx(new.mean())
            assert z[1, i] == pytest.approx((new.mean() - past.mean()) / (past.std() / math.sqrt(5)))


# Simulation


def test_simulated_shares_are_as_asked():
    pool, negative = held_out()
    made = simulate.simulate(pool, negative, 2000, 100, 0.2, 3, 30, np.random.default_rng(0), history=50)
    position = np.arange(150) - made.starts[:, None]
    inside = (position >= 0) & (position < 30)
    assert made.negative[inside].mean() == pytest.approx(0.6, abs=0.01)
    assert made.negative[~inside].mean() == pytest.approx(0.2, abs=0.01)
    assert made.starts.min() == 51 and made.starts.max() == 120
    np.testing.assert_array_equal(negative[made.documents], made.negative)
    np.testing.assert_array_equal(pool[made.documents], made.scores)
    assert (np.diff(made.times, axis=1) >= 0).all()
    assert made.times.max() / simulate.DAY == pytest.approx(7 * 1.5, abs=0.01), "150 documents are a week and a half"


@pytest.mark.parametrize(("length", "negative"), [(100, [True, False]), (0, [True, False]), (10, [True, True])])
def test_what_cannot_be_simulated_is_refused(length, negative):
    with pytest.raises(NewsError):
        simulate.simulate(np.array([0.9, 0.1]), np.array(negative), 3, 100, 0.2, 3, length, np.random.default_rng(0))


def test_a_larger_threshold_is_as_much_rarer():
    """Ten times the documents, for which `monitor --every` multiplies the threshold."""
    (pool, negative), random = held_out(), np.random.default_rng(0)
    quiet = simulate.simulate(pool, negative, 200, 2000, 0.2, 1, 5, random, history=200)
    path, ends = surge.cusum(quiet.scores, surge.Settings(share=0.2)), np.full(200, 2200)
    alarms = simulate.outcomes(path, path, ends, 1, np.array([115.0, 1150.0]), skip=200).false[:200].sum(axis=0)
    assert 7 < alarms[0] / alarms[1] < 14, alarms


# Evaluation


def test_operating_curve_by_hand():
    quiet = np.array([[0, 2, 0, 2, 0, 0], [0, 0, 0, 4, 3, 0.0]])
    planted = np.array([[0, 0, 0, 2, 4, 0], [2, 0, 0, 0, 0, 4], [0, 0, 5, 5, 5, 0.0]])
    starts = np.array([3, 2, 3])

    def curve_of(length: int) -> pd.DataFrame:
        played = simulate.outcomes(quiet, planted, starts, length, np.array([4.0, 1.0]))
        return simulate.operating_curve(played, 10).set_index("threshold")

    curve = curve_of(3)
    # 12 quiet documents and 8 before surges
    assert curve["false alarms a week"].tolist() == pytest.approx([10 * 5 / 20, 10 * 2 / 20])
    # at 1: at once, after 4 documents (too late), and never raised anew; at 4: after 2, and the same
    assert curve["detected"].tolist() == pytest.approx([1 / 3, 1 / 3])
    assert curve["median delay"].tolist() == [np.inf, np.inf]
    longer = curve_of(4)
    assert longer["detected"].tolist() == pytest.approx([2 / 3, 2 / 3])
    assert longer["median delay"].tolist() == [4, 4]
    played = simulate.outcomes(quiet, planted, starts, 4, np.array([1.0, 4.0]), skip=2)
    assert played.delays.tolist() == [[1, 2], [4, 4], [np.inf, np.inf]]
    assert played.false.tolist() == [[1, 0], [1, 1], [0, 0], [0, 0], [1, 1]], "none is counted before document 2"
    assert played.exposure.tolist() == [4, 4, 1, 0, 1]


def test_intervals_hold_the_estimate_and_shrink_with_more_weeks():
    widths = []
    for weeks in (50, 800):
        quiet, planted = streams(0.2, weeks, seed=1)
        assumed = surge.Settings(share=0.2, strength=KNOWN)
        few = (surge.cusum(quiet.scores, assumed), surge.cusum(planted.scores, assumed))
        played = simulate.outcomes(*few, planted.starts, 40, np.array([115.0]))
        row = simulate.operating_curve(played, 100, resamples=200).iloc[0]
        assert row["median delay, low"] <= row["median delay"] <= row["median delay, high"]
        widths.append(row["median delay, high"] - row["median delay, low"])
    assert 0 < widths[1] < widths[0] / 2


def test_the_threshold_is_the_lowest_from_which_on_the_rate_is_kept():
    """Under it, an alarm that never ends is rare as well."""
    curve = pd.DataFrame({"threshold": [1.0, 2, 3, 4], "false alarms a week": [0.5, 2, 0.9, 0.1]})
    assert simulate.delay_at(curve)["threshold"] == 3
    assert simulate.delay_at(curve, 5)["threshold"] == 1
    with pytest.raises(NewsError, match="higher"):
        simulate.delay_at(curve, 0.01)


def test_comparison_finds_a_planted_difference_and_none_without_one():
    random = np.random.default_rng(0)
    false = np.stack([random.poisson(2, 600), random.poisson(0.5, 600)], axis=1).astype(float)
    false[300] = 9  # before the first surge alone: where that were drawn in place of all others, no threshold would do
    delays = random.integers(5, 25, (300, 1)).astype(float)
    slow = simulate.Outcomes(false, np.full(600, 100), np.hstack([delays - 3, delays]), np.array([1.0, 2.0]))
    fast = slow._replace(delays=slow.delays - 4)
    assert simulate.compare(fast, slow, 100, resamples=50) == (-4, -4, -4)
    other = slow._replace(delays=random.permuted(slow.delays, axis=0))
    difference, low, high = simulate.compare(slow, other, 100, resamples=200)
    assert difference == 0 and low < 0 < high
    strict = slow._replace(false=false[:, ::-1])  # its second threshold has the alarms
    with pytest.raises(NewsError, match="higher"):
        simulate.compare(strict, slow, 100, resamples=1)


def tuned(assumed: surge.Settings, distance: float, seed: int = 1, change=lambda scores: scores) -> pd.Series:
    """One false alarm a week of 100 documents, at a baseline of 0.2."""
    quiet, planted = streams(0.2, 400, seed, distance=distance, history=100)
    values = surge.cusum(change(quiet.scores), assumed), surge.cusum(change(planted.scores), assumed)
    thresholds = simulate.candidate_thresholds(values[0], skip=100, number=41)
    played = simulate.outcomes(*values, planted.starts, 40, thresholds, skip=100)
    return simulate.delay_at(simulate.operating_curve(played, 100, resamples=20))


def test_better_scores_are_not_slower_and_probabilities_not_slower_than_their_labels():
    assumed = surge.Settings(share=0.2)
    delays = [tuned(assumed, distance)["median delay"] for distance in (0.8, 1.6, 3.2)]
    assert delays[0] > delays[1] > delays[2]
    right = 0.788  # of both classes, at a distance of 1.6
    labels = tuned(assumed, 1.6, change=lambda scores: np.where(scores >= 0.5, right, 1 - right))
    assert labels["median delay"] > delays[1]


def test_live_detectors_keep_the_promised_false_alarms_and_find_surges():
    """The threshold comes from some streams, and the alarms from others, long ones, one document at a time."""
    assumed = surge.Settings(share=0.2)
    threshold = float(tuned(assumed, 1.6)["threshold"])
    quiet, _ = streams(0.2, 8, seed=5, per_week=1100)
    _, planted = streams(0.2, 40, seed=6, history=100)
    alerts = 0
    for row in quiet.scores:
        live = surge.Cusum(assumed, threshold)
        raised = [live.update(0, p) is not None for p in row]
        alerts += sum(raised[100:])
    assert 0.7 < alerts / (8 * 10) < 1.3
    found = 0
    for row, start in zip(planted.scores, planted.starts, strict=True):
        live = surge.Cusum(assumed, threshold)
        at = [i for i, p in enumerate(row) if live.update(i, p)]
        found += any(start <= i < start + 40 for i in at)
    assert found >= 30
