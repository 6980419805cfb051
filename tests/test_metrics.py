"""metrics.py against scikit-learn, SciPy and definitions."""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from training import metrics

N, C = 120, 3


def some_scores(decimals=7, seed=0):
    """Scores [N, C] with ties at few decimals, and truth with unknown labels."""
    rng = np.random.default_rng(seed)
    truth = (rng.random((N, C)) < [0.1, 0.5, 0.8]).astype(np.float32)
    scores = (truth + rng.normal(size=(N, C))).round(decimals)
    truth[rng.random((N, C)) < 0.2] = np.nan
    return scores, truth


def some_logits(n=400, classes=4, seed=0):
    """int labels [n] and float32 logits [n, classes] that are overconfident by a factor of 3."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes)) * 2
    labels = np.array([rng.choice(classes, p=row) for row in metrics.probabilities(logits, False)])
    return labels, (3 * logits).astype(np.float32)


# ---- under weights ------------------------------------------------------------------------

@pytest.mark.parametrize('decimals', [0, 1, 7], ids=['few scores', 'many ties', 'no ties'])
def test_auc_and_average_precision_are_scikit_learns_for_each_column_of_weights(decimals):
    scores, truth = some_scores(decimals)
    weights = np.random.default_rng(1).integers(0, 4, (N, 5)).astype(float)
    weights[:, 0] = 1
    for c in range(C):
        known = ~np.isnan(truth[:, c])
        auc, average_precision = metrics.rank_metrics(scores[:, c], truth[:, c], weights)
        for column, *found in zip(weights[known].T, auc, average_precision, strict=True):
            data = truth[known, c], scores[known, c]
            expected = [score(*data, sample_weight=column) for score in (
                sklearn.metrics.roc_auc_score, sklearn.metrics.average_precision_score)]
            np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('truth, auc, average_precision', [
    ([1, 1, 1], np.nan, 1), ([0, 0, 0], np.nan, np.nan), ([np.nan] * 3, np.nan, np.nan),
    ([0, np.nan, 1], 1, 1), ([1, np.nan, 0], 0, 0.5)])
def test_rank_metrics_of_odd_labels(truth, auc, average_precision):
    found = metrics.rank_metrics(np.array([1.0, 2.0, 3.0]), np.array(truth, float), np.ones((3, 1)))
    np.testing.assert_array_equal(np.ravel(found), [auc, average_precision])


def test_decisions_are_scored_as_by_scikit_learn():
    scores, truth = some_scores()
    decisions, weights = scores > 0.5, np.random.default_rng(1).integers(0, 4, (N, 2)).astype(float)
    found = metrics.decision_metrics(decisions, truth, weights)
    for c in range(C):
        known = ~np.isnan(truth[:, c])
        for r in range(2):
            data = dict(y_true=truth[known, c], y_pred=decisions[known, c],
                        sample_weight=weights[known, r])
            expected = {'sensitivity': sklearn.metrics.recall_score(**data),
                        'specificity': sklearn.metrics.recall_score(pos_label=0, **data),
                        'precision': sklearn.metrics.precision_score(**data),
                        'f1': sklearn.metrics.f1_score(**data)}
            assert {name: values[c, r] for name, values in found.items()} == pytest.approx(expected)


def test_log_odds_do_not_tie_where_probabilities_do():
    _, logits = some_logits()
    shares = metrics.probabilities(logits.astype(float) / 10, False)
    np.testing.assert_allclose(metrics.log_odds(logits / 10, False), np.log(shares / (1 - shares)),
                               rtol=1e-5, atol=1e-5)
    saturated = np.float32([[50, -50, 3], [60, -50, 3], [50, -50, 7]])
    assert np.unique(metrics.probabilities(saturated, False)[:, 0]).size == 1
    assert metrics.log_odds(saturated, False)[:, 0].tolist() == pytest.approx([47, 57, 43])
    two = np.float32([[40, -40], [-3, 4]])
    np.testing.assert_allclose(metrics.log_odds(two, False), [[80, -80], [-7, 7]])


# ---- bootstrap ----------------------------------------------------------------------------

def test_intervals_are_those_of_scipy():
    labels, logits = some_logits(200)
    hits = (logits.argmax(1) == labels).astype(float)
    found = metrics.bootstrap(lambda weights: {'share': hits @ weights / weights.sum(0)},
                              np.arange(len(hits)), resamples=5000)['share']
    theirs = scipy.stats.bootstrap([hits], np.mean, n_resamples=5000, method='percentile',
                                   random_state=0).confidence_interval
    np.testing.assert_allclose(found, theirs, atol=0.006)  # an image is 0.005


def test_resamples_are_the_same_however_many_are_in_memory(monkeypatch):
    statistics = lambda weights: {'x': np.arange(90) @ weights}
    whole = metrics.bootstrap(statistics, np.arange(90))['x']
    monkeypatch.setattr(metrics, 'CHUNK', 90 * 7)
    assert metrics.bootstrap(statistics, np.arange(90))['x'].tolist() == whole.tolist()


def test_what_is_the_same_in_all_resamples_has_no_interval():
    hits = np.stack([np.ones(30), np.arange(30) % 2])
    found = metrics.bootstrap(lambda weights: {'each': hits @ weights, 'all': hits[0] @ weights},
                              np.arange(30))
    assert np.isnan(found['each'][:, 0]).all() and np.isfinite(found['each'][:, 1]).all()
    assert np.isnan(found['all']).all()


def test_whole_groups_are_drawn():
    groups = ['a', None, 'b', 'a', None, 'b', 'a', '']
    units = metrics.units(groups, 8)
    assert units.tolist() == [0, 1, 2, 0, 3, 2, 0, 4]  # None: an image of its own
    seen = []
    metrics.bootstrap(lambda weights: seen.append(weights) or {'x': weights[:1]}, units, 50)
    for weights in np.concatenate(seen, 1).T:
        assert all(len({weights[i] for i in np.flatnonzero(units == unit)}) == 1
                   for unit in range(5))
        assert sum(weights[np.flatnonzero(units == unit)[0]] for unit in range(5)) == 5
    assert metrics.units(None, 3).tolist() == [0, 1, 2]


# ---- thresholds and calibration -----------------------------------------------------------

def test_thresholds_have_the_highest_sensitivity_plus_specificity():
    scores, truth = some_scores()
    truth[:, 2] = np.nan
    for c, cut in enumerate(metrics.youden_thresholds(scores, truth)):
        if c == 2:
            assert cut == 0
            continue
        known = ~np.isnan(truth[:, c])
        found, *others = (
            sklearn.metrics.balanced_accuracy_score(truth[known, c], scores[known, c] >= other)
            for other in (cut, *scores[known, c]))
        assert found == max(others)


def test_the_temperature_is_found_and_lowers_the_loss_of_other_images():
    for multi_label in (False, True):
        (labels, logits), (others, other_logits) = some_logits(2000), some_logits(2000, seed=1)
        truth, other_truth = metrics.one_hot(labels, 4), metrics.one_hot(others, 4)
        if multi_label:
            rng = np.random.default_rng(0)
            truth, other_truth = (
                (rng.random(x.shape) < metrics.probabilities(x / 3, True)).astype(np.float32)
                for x in (logits, other_logits))
        temperature = metrics.fit_temperature(truth, logits, multi_label)
        assert temperature == pytest.approx(3, rel=0.08)
        before, after = (metrics.negative_log_likelihood(other_truth, other_logits, multi_label, t)
                         for t in (1.0, temperature))
        assert after < 0.7 * before
        errors = [metrics.expected_calibration_error(*metrics.confidences(
            other_truth, other_logits, multi_label, t)) for t in (1.0, temperature)]
        assert errors[1] < 0.05 < 0.1 < errors[0]


def test_negative_log_likelihood_is_scikit_learns():
    labels, logits = some_logits()
    expected = sklearn.metrics.log_loss(labels, metrics.probabilities(logits / 2, False))
    truth = metrics.one_hot(labels, 4)
    assert metrics.negative_log_likelihood(truth, logits, False, 2.0) == pytest.approx(expected)
    scores, truth = some_scores()
    known = ~np.isnan(truth)
    expected = sklearn.metrics.log_loss(truth[known], metrics.probabilities(scores, True)[known])
    assert metrics.negative_log_likelihood(truth, scores, True) == pytest.approx(expected)


def test_calibration_error_by_hand():
    confidence = np.array([0.95, 0.97, 0.99, 0.5, 0.55, 1 / 15, 0.0, 1.0])
    came_true = np.array([1, 1, 0, 1, 0, 0, 0, 1])
    numbers, means, shares = metrics.calibration_bins(confidence, came_true)
    assert numbers.tolist() == [2, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 4]
    assert means[[0, 7, 8, 14]].tolist() == pytest.approx([1 / 30, 0.5, 0.55, 3.91 / 4])
    assert shares[[0, 7, 8, 14]].tolist() == [0, 1, 0, 0.75] and np.isnan(means[1])
    expected = (2 * (1 / 30) + 0.5 + 0.55 + 4 * (3.91 / 4 - 0.75)) / 8
    assert metrics.expected_calibration_error(confidence, came_true) == pytest.approx(expected)


# ---- all of it ----------------------------------------------------------------------------

@pytest.mark.filterwarnings('error')
def test_summary_of_single_label_data():
    labels, logits = some_logits()
    truth, classes = metrics.one_hot(labels, 5), ['a', 'b', 'c', 'd', 'never']
    logits = np.pad(logits, [(0, 0), (0, 1)], constant_values=-9)
    found = metrics.summarize(truth, logits, classes, False)
    answers, shares = logits.argmax(1), metrics.probabilities(logits, False)
    assert found['error'] == pytest.approx(100 * np.mean(answers != labels))
    assert found['balanced_error'] == pytest.approx(
        100 - 100 * sklearn.metrics.balanced_accuracy_score(labels, answers))
    assert found['mean_auc'] == pytest.approx(
        sklearn.metrics.roc_auc_score(labels, shares[:, :4] / shares[:, :4].sum(1, keepdims=True),
                                      multi_class='ovr'), abs=1e-3)
    for key in ('error', 'balanced_error', 'mean_auc', 'mean_f1'):
        low, high = found[f'{key}_interval']
        assert low < found[key] < high
    *rows, never = found['classes']
    assert [row['recall'] for row in rows] == pytest.approx(
        sklearn.metrics.recall_score(labels, answers, average=None))
    assert all(row['sensitivity'] == row['recall'] and 'threshold' not in row for row in rows)
    assert never['auc'] is never['recall'] is never['auc_interval'] is never['precision'] is None
    assert (found['images'], found['units'], never['negatives']) == (400, 400, 400)
    assert found['nll_with_temperature'] is None


@pytest.mark.filterwarnings('error')
def test_summary_of_multi_label_data():
    scores, truth = some_scores()
    found = metrics.summarize(truth, scores, ['a', 'b', 'c'], True, thresholds=np.array([0, 1, -1]),
                              temperature=2.0, groups=[str(i // 2) for i in range(N)])
    assert 'error' not in found and found['units'] == N // 2
    for c, row in enumerate(found['classes']):
        known = ~np.isnan(truth[:, c])
        assert row['auc'] == pytest.approx(
            sklearn.metrics.roc_auc_score(truth[known, c], scores[known, c]))
        assert row['f1'] == pytest.approx(
            sklearn.metrics.f1_score(truth[known, c], scores[known, c] >= [0, 1, -1][c]))
        assert row['threshold'] == pytest.approx(1 / (1 + np.exp(-[0, 1, -1][c])))
        assert row['positives'] + row['negatives'] == known.sum()
    assert found['mean_auc'] == pytest.approx(np.mean([row['auc'] for row in found['classes']]))
    assert found['nll_with_temperature'] == metrics.negative_log_likelihood(truth, scores, True, 2)


def test_no_intervals_for_each_of_many_classes():
    labels, logits = some_logits(150, 101)
    found = metrics.summarize(metrics.one_hot(labels, 101), logits, list(map(str, range(101))),
                              False)
    assert found['mean_auc_interval'] is None and found['classes'][0]['auc_interval'] is None
    assert found['error_interval'][0] < found['error'] < found['error_interval'][1]
