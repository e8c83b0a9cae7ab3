"""The search over candidates: which are trained on which folds, and what they share."""

import math

import numpy as np
import pytest
import torch
from test_stacking import SIZES, TRAINING, linear_examples

from sklearn_relish.training import search
from sklearn_relish.training.search import Candidate, search_heads
from sklearn_relish.training.trainer import evaluate, new_head, train_head, train_stages

CPU = torch.device("cpu")
OPTIONS = {name: TRAINING[name] for name in ("loss_fn", "n_iter_no_change", "device")}
SETTINGS = {"learning_rate": 5e-3, "weight_decay": 0.01, "batch_size": 16, "max_epochs": 3}


def candidate(n_iterations=1, deep_supervision=True, learning_rate=5e-3, **sizes):
    sizes = SIZES | {"n_outputs": 1, "n_iterations": n_iterations} | sizes
    settings = SETTINGS | {"learning_rate": learning_rate, "deep_supervision": deep_supervision}
    values = {"latent_size": sizes["latent_size"], "learning_rate": learning_rate}
    return Candidate(values, sizes, settings)


def folds_of(n_rows, n_folds):
    parts = np.array_split(np.random.RandomState(0).permutation(n_rows), n_folds)
    return [(np.setdiff1d(np.arange(n_rows), part), np.sort(part)) for part in parts]


def run(candidates, n_folds=4, score=None, trained=None, **changes):
    examples = linear_examples(80)
    folds = folds_of(80, n_folds)

    def r2(candidate, fold, predictions):
        raw = torch.from_numpy(predictions).float()
        return evaluate(raw, examples[folds[fold][1]], OPTIONS["loss_fn"])["validation_r2"]

    return search_heads(
        examples,
        folds,
        candidates,
        score or r2,
        seeds=[(fold, fold) for fold in range(n_folds)],
        trained={} if trained is None else trained,
        progress=False,
        max_memory=math.inf,
        **OPTIONS | changes,
    )


def test_the_worse_half_of_the_trainings_is_dropped_after_each_fold():
    candidates = [candidate(latent_size=size) for size in (2, 4, 6, 8, 10)]
    quality = [0.1, 0.5, 0.3, 0.4, 0.2]
    seen = []

    def score(candidate, fold, predictions):
        seen.append(fold)
        number = seen.count(fold) - 1
        return [quality, [0.5, 0.3, 0.4], [0.5, 0.4], [0.5]][fold][number]

    result = run(candidates, score=score)
    assert [seen.count(fold) for fold in range(4)] == [5, 3, 2, 1]
    trained = np.isfinite(result.scores).sum(axis=1)
    assert trained.tolist() == [1, 4, 2, 3, 1]
    assert result.best_index == 1
    assert len(result.heads) == 4
    assert np.array_equal(np.isfinite(result.seconds), np.isfinite(result.scores))


def test_the_first_of_equal_candidates_is_taken():
    candidates = [candidate(n, latent_size=size) for size in (2, 4) for n in (1, 2)]
    assert run(candidates, score=lambda *_: 0.5).best_index == 0


def test_numbers_of_iterations_share_a_training_with_deep_supervision_alone(monkeypatch):
    calls = []

    def counting(original):
        def call(head, *args, **options):
            calls.append(head.n_iterations)
            return original(head, *args, **options)

        return call

    monkeypatch.setattr(search, "train_head", counting(train_head))
    monkeypatch.setattr(search, "train_stages", counting(train_stages))
    run([candidate(n) for n in (2, 1, 3)], n_folds=2)
    assert calls == [3, 3]
    calls.clear()
    run([candidate(n, deep_supervision=False) for n in (2, 1, 3)], n_folds=2)
    assert sorted(calls[:3]) == [1, 2, 3]


@pytest.mark.parametrize("share_weights", [False, True])
def test_a_stage_is_the_head_without_its_last_iterations(share_weights):
    examples = linear_examples(60)
    train, validation = examples[np.arange(45)], examples[np.arange(45, 60)]
    sizes = SIZES | {"n_outputs": 1, "n_iterations": 3, "share_weights": share_weights}
    options = SETTINGS | OPTIONS | {"seed": 0}
    stages = train_stages(new_head(0, **sizes), train, validation, iterations=[1, 2, 3], **options)
    for number, (head, training) in zip((1, 2, 3), stages, strict=True):
        assert head.n_iterations == number
        assert len(head.blocks) == (1 if share_weights else number)
        best = min(training.history, key=lambda epoch: epoch["validation_loss"])
        assert training.best_epoch == best["epoch"]
        rows = torch.arange(15)
        raw = head(*validation.states.batch(rows)).detach()
        loss = evaluate(raw, validation, OPTIONS["loss_fn"])["validation_loss"]
        assert loss == pytest.approx(best["validation_loss"], rel=1e-5)
    # The last stage is what `train_head` gives, to the last bit.
    alone = new_head(0, **sizes)
    training = train_head(alone, train, validation, deep_supervision=True, **options)
    assert training.history == stages[-1][1].history
    for name, weight in alone.state_dict().items():
        assert torch.equal(weight, stages[-1][0].state_dict()[name])


def test_a_diverging_candidate_is_left_out():
    candidates = [candidate(learning_rate=1e30), candidate()]
    with pytest.warns(UserWarning, match=r"diverged.*Dropped: .*'learning_rate': 1e\+30"):
        result = run(candidates)
    assert result.best_index == 1
    assert np.isnan(result.scores[0]).all()
    with pytest.raises(FloatingPointError, match="diverged"):
        run(candidates[:1])


def test_a_fold_without_a_score_is_an_error():
    with pytest.raises(ValueError, match=r"No score is finite on fold 1: .*more texts"):
        run([candidate()], score=lambda _, fold, predictions: [0.5, np.nan][fold], n_folds=2)


@pytest.mark.usefixtures("one_thread")
def test_an_interrupted_search_continues_with_what_it_has_trained(monkeypatch):
    candidates = [candidate(latent_size=size) for size in (4, 8)]
    complete = run(candidates)
    original, trained, calls = search.train_candidates, {}, []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(search, "train_candidates", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(candidates, trained=trained)
    assert len(trained) == 3
    result = run(candidates, trained=trained)
    assert len(calls) == 4 + 2  # 2 + 1 + 1 + 1 trainings in all
    assert result.best_index == complete.best_index
    assert np.array_equal(result.scores, complete.scores, equal_nan=True)


def test_equal_candidates_have_equal_scores():
    for deep_supervision in (True, False):
        candidates = [candidate(2, deep_supervision), candidate(2, deep_supervision)]
        result = run(candidates)
        alone = run(candidates[:1])
        assert result.scores[0].tolist() == result.scores[1].tolist() == alone.scores[0].tolist()


def test_the_order_of_the_numbers_of_iterations_does_not_matter():
    rising = run([candidate(1), candidate(3)], n_iter_no_change=1)
    falling = run([candidate(3), candidate(1)], n_iter_no_change=1)
    assert rising.scores.tolist() == falling.scores[::-1].tolist()


def test_heads_of_dropped_candidates_are_not_kept():
    trained = {}
    run([candidate(latent_size=size) for size in (4, 8)], trained=trained)
    kept = {key[1] for key, results in trained.items() if results[0].head is not None}
    assert len(kept) == 1
    assert all(results[0].training.oof_predictions is not None for results in trained.values())


def test_a_single_held_out_text_is_predicted_by_the_last_epoch():
    examples = linear_examples(30)
    train, validation = examples[np.arange(29)], examples[np.array([29])]
    head = new_head(0, **SIZES, n_outputs=1)
    training = train_head(head, train, validation, seed=0, **SETTINGS | OPTIONS)
    # Without validation, the weights of the last epoch are kept.
    last = new_head(0, **SIZES, n_outputs=1)
    train_head(last, train, None, seed=0, **SETTINGS | OPTIONS)
    expected = last(*validation.states.batch(torch.tensor([0]))).detach().numpy()
    np.testing.assert_allclose(training.oof_predictions, expected, rtol=1e-5)
