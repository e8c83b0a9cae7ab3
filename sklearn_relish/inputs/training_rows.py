"""Training rows: distinct pairs of text and target with summed weights, in standardized units.

A fit on them depends neither on the order of the rows nor on whether a row is repeated or weighted.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sklearn_relish.utils.messages import warn


class TrainingRows(NamedTuple):
    """The distinct pairs of text and target, sorted by both.

    Parameters
    ----------
    texts : list of str, or of tuple of str
        One for each pair; a tuple has the text of each prompt.
    groups : int64 ndarray of shape (n_pairs,)
        A number from 0 for each distinct text: pairs of equal texts are one group.
    y : float64 ndarray of shape (n_pairs, n_outputs)
        Targets in their own units.
    weight : float64 ndarray of shape (n_pairs,)
        Summed weights, with a mean of 1.
    pairs : int64 ndarray of shape (n_rows,)
        The pair of each row; -1 if its pair was dropped.
    """

    texts: list[Any]
    groups: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    pairs: np.ndarray

    @property
    def n_texts(self) -> int:
        """Number of distinct texts."""
        return int(self.groups.max()) + 1

    def texts_of_view(self, view: int) -> list[str]:
        """The text of each pair under one prompt, numbered from 0."""
        return [text if isinstance(text, str) else text[view] for text in self.texts]

    def components(self) -> np.ndarray:
        """A number from 0 for each pair, the same for pairs that are to be held out together.

        With several prompts, rows may share some of their texts, such as a pair of texts and the
        same pair in the other order. They are held out together, and so are rows that are connected
        by other rows. With one prompt these are the groups.
        """
        if isinstance(self.texts[0], str):
            return self.groups
        numbers: dict[str, int] = {}
        n_groups = self.n_texts
        edges = [
            (group, n_groups + numbers.setdefault(text, len(numbers)))
            for group, texts in zip(self.groups.tolist(), self.texts, strict=True)
            for text in texts
        ]
        size = n_groups + len(numbers)
        graph = coo_array((np.ones(len(edges)), np.transpose(edges)), shape=(size, size))
        _, labels = connected_components(graph, directed=False)
        components = np.unique(labels[self.groups], return_inverse=True)[1]
        if n_groups > 1 and components.max() == 0:
            warn(
                "All rows are connected by texts that they share, so none is held out: leave out"
                " prompts that give the same text for many rows.",
            )
        return components

    @classmethod
    def from_rows(
        cls,
        texts: list[Any],
        y: np.ndarray,
        weight: np.ndarray,
        parts: np.ndarray | None = None,
    ) -> TrainingRows:
        """Merge equal rows. Pairs whose weight is 0 in float32, the head's dtype, are dropped.

        Parameters
        ----------
        texts : list of str, or of tuple of str
        y : ndarray of shape (n_rows, n_outputs)
        weight : ndarray of shape (n_rows,)
        parts : int64 ndarray of shape (n_rows,), default=None
            Rows of different parts are not merged. None: there is one part.
        """
        y = y + 0.0  # -0.0 becomes 0.0, which it equals
        # Scaling by a power of two is exact, and the sums are finite.
        weight = np.ldexp(weight, -int(np.frexp(weight.max())[1]))
        rank = {text: i for i, text in enumerate(sorted(set(texts)))}
        groups = np.array([rank[text] for text in texts], dtype=np.int64)
        parts = np.zeros(len(texts), dtype=np.int64) if parts is None else parts
        order = np.lexsort((parts, *y.T[::-1], groups))
        texts, groups, y = [texts[row] for row in order], groups[order], y[order]
        parts = parts[order]
        is_new = np.ones(len(order), dtype=bool)
        is_new[1:] = (groups[1:] != groups[:-1]) | (y[1:] != y[:-1]).any(axis=1)
        is_new[1:] |= parts[1:] != parts[:-1]
        first = np.flatnonzero(is_new)
        # fsum rounds once, so the sum does not depend on the order of the rows.
        weight = np.array([math.fsum(part) for part in np.split(weight[order], first[1:])])
        used = np.flatnonzero((weight / weight.max()).astype(np.float32))
        number = np.full(len(first), -1)
        number[used] = np.arange(len(used))
        pairs = np.empty(len(order), dtype=np.int64)
        pairs[order] = number[is_new.cumsum() - 1]
        first, weight = first[used], weight[used]
        _, groups = np.unique(groups[first], return_inverse=True)
        return cls([texts[row] for row in first], groups, y[first], weight / weight.mean(), pairs)


class TargetScaler(NamedTuple):
    """The units of the target: ``standardized = (y - mean) / scale`` for each output.

    Parameters
    ----------
    mean, scale : float64 ndarray of shape (n_outputs,)
        The scale of a constant output is 0, so its prediction is its mean. Under a log link the
        mean is 0 and the scale is the mean of the target.
    log_link : bool
        Whether the loss has a log link.
    """

    mean: np.ndarray
    scale: np.ndarray
    log_link: bool

    @classmethod
    def fit(
        cls, y: np.ndarray, weight: np.ndarray, *, log_link: bool, fixed: np.ndarray
    ) -> TargetScaler:
        """Weighted mean and standard deviation of each output.

        Parameters
        ----------
        y : ndarray of shape (n, n_outputs)
        weight : ndarray of shape (n,)
        log_link : bool
        fixed : bool ndarray of shape (n_outputs,)
            Outputs whose units are known from an earlier fit: no warning if they are constant.

        Raises
        ------
        ValueError
            If the squares of the targets or weights do not fit in float64.

        Warns
        -----
        UserWarning
            If an output is constant.
        """
        constant = np.ptp(y, axis=0) == 0
        if (constant & ~fixed).any():
            columns = np.flatnonzero(constant & ~fixed).tolist()
            which = f" in columns {columns}" if len(constant) > 1 else ""
            warn(f"y is constant{which}: the prediction will be that constant.")
        mean = np.where(constant, y[0], np.average(y, axis=0, weights=weight))
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            scale = np.sqrt(np.average((y - mean) ** 2, axis=0, weights=weight))
        if not (np.isfinite(scale).all() and (constant | (scale > 0)).all()):
            raise ValueError(
                "y, or sample_weight, spans more than float64 can square: bring it nearer to 1"
                " first, by a factor or a logarithm."
            )
        if log_link:
            mean, scale = np.where(constant, mean, 0.0), mean
        return cls(mean, np.where(constant, 0.0, scale), log_link)

    def standardize(self, y: np.ndarray) -> np.ndarray:
        """Targets in standardized units; of a constant output the value that minimizes the loss."""
        constant_target = 1.0 if self.log_link else 0.0
        divisor = np.where(self.scale > 0, self.scale, 1.0)
        return np.where(self.scale > 0, (y - self.mean) / divisor, constant_target)
