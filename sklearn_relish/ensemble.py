"""Several heads and a linear path, weighed by what each foretold of texts it had not seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sklearn_relish.head import RelishEnsemble
from sklearn_relish.ridges import fit_ridges, stack
from sklearn_relish.training import Examples, Training, new_head, train_head

LEAST_TEXTS = 10  # held-out texts without which nothing is weighed
RIDGE_TEXTS = 10_000  # that the ridges are fitted on at most
PRIOR = (0.5, 0.3, 0.2)  # the weights of heads and ridges that no rows would give


def fit_ensemble(
    examples: Examples,
    text: np.ndarray,
    held_out: list[np.ndarray],
    *,
    linear_path: bool,
    sizes: dict[str, Any],
    random: np.random.RandomState,
    device: torch.device,
    **training: Any,
) -> tuple[RelishEnsemble, list[Training]]:
    """Fit a head for each set of held-out rows, and the linear path beside them.

    Each head is trained on all other rows and stopped by its own. The linear path is a ridge on
    the mean of a text's token states and one on its last state, whose leave-one-out predictions
    come with the fit. Heads and ridges are weighed by what they foretold of texts that they had
    not seen, see `sklearn_relish.ridges.stack`. A head is weighed alone, and counts for no more
    than that in the mean of several.

    Parameters
    ----------
    examples : Examples
    text : int64 ndarray of shape (n,)
        A number from 0 for each example, the same for equal texts.
    held_out : list of int64 ndarray
        An entry a head, equal texts together; an empty one for a head that learns from all rows.
    linear_path : bool
        Whether there is a linear path, given enough held-out texts.
    sizes : dict
        Arguments of `RelishHead`.
    random : RandomState
        Draws each head's weights, the order of its texts and the texts of the ridges.
    device : torch.device
        Where heads are trained.
    **training
        Further arguments of `train_head`.

    Returns
    -------
    ensemble : RelishEnsemble
        On the CPU.
    trainings : list of Training
        The course of each head's.
    """
    n_rows = len(examples.states)
    heads, trainings = [], []
    foretold, times = np.zeros(examples.y.shape), np.zeros(n_rows)
    for rows in held_out:
        learned = np.setdiff1d(np.arange(n_rows), rows)
        head = new_head(random.randint(np.iinfo(np.int32).max), **sizes)
        course = train_head(
            head,
            examples[learned],
            examples[rows] if len(rows) else None,
            seed=random.randint(np.iinfo(np.int32).max),
            device=device,
            **training,
        )
        if len(rows):
            y, weight = examples.y[learned].numpy(), examples.weight[learned].numpy()
            foretold[rows] += course.foretold - np.average(y, axis=0, weights=weight)
            times[rows] += 1
        heads.append(head)
        trainings.append(course)
    _, first = np.unique(text, return_index=True)
    chosen = np.sort(random.permutation(len(first))[:RIDGE_TEXTS])
    times = times[first[chosen]]
    linear_path = linear_path and np.count_nonzero(times) >= LEAST_TEXTS
    ensemble = RelishEnsemble(heads, linear_path)
    if linear_path:
        foretold = foretold[first[chosen]] / np.maximum(times, 1)[:, None]
        _set_linear_path(ensemble, examples.merged(text)[chosen], times > 0, foretold)
    return ensemble.eval(), trainings


def _set_linear_path(
    ensemble: RelishEnsemble, texts: Examples, seen: np.ndarray, foretold: np.ndarray
) -> None:
    """Fit the ridges, weigh them and the heads on the texts that were held out, set weights."""
    y, weight = texts.y.double().numpy(), texts.weight.double().numpy()
    ridges = fit_ridges(texts.states, ensemble.state_norm, y, weight)
    for j in range(y.shape[1]):
        told = [foretold[seen, j], *(ridge.foretold[seen, j] for ridge in ridges)]
        share, *shares = stack(told, y[seen, j], weight[seen], PRIOR)
        ensemble.share[j] = share
        coefs = [part * ridge.coef[j] for part, ridge in zip(shares, ridges, strict=True)]
        ensemble.linear.weight[j] = torch.from_numpy(np.concatenate(coefs))
        ensemble.linear.bias[j] = sum(
            part * ridge.intercept[j] for part, ridge in zip(shares, ridges, strict=True)
        )
