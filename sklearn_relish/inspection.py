"""`RefinementDisplay`: pictures of what the iterations do to a prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils import check_consistent_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sklearn_relish.regressor import RelishRegressor, TextAttention

CHARACTER = 0.602  # width of a monospaced character, in font sizes
LINE = 1.45  # height of a line, in font sizes


class RefinementDisplay:
    """How predictions are refined, iteration by iteration.

    For one text: the text with its tokens shaded by attention, a row an iteration, and beside it
    the path of the prediction. For several, whose numbers are known: the error by iteration. Make
    it with `from_estimator`.

    Parameters
    ----------
    stages : ndarray of shape (n_iterations, n_texts)
        The prediction after each iteration, in the units of the target.
    attention : TextAttention, default=None
        Of the text, if it is one: see `RelishRegressor.attention`.
    y : ndarray of shape (n_texts,), default=None
        The true numbers.

    Attributes
    ----------
    figure_ : matplotlib.figure.Figure
        Once it is plotted.
    axes_ : ndarray of matplotlib.axes.Axes
        Of one text, the text and the path; of several, the error.

    Examples
    --------
    >>> from sklearn_relish import RefinementDisplay
    >>> RefinementDisplay.from_estimator(regressor, "A dull film.", y=3.1)  # doctest: +SKIP
    """

    def __init__(
        self,
        stages: np.ndarray,
        *,
        attention: TextAttention | None = None,
        y: np.ndarray | None = None,
    ) -> None:
        self.stages = stages
        self.attention = attention
        self.y = y

    @classmethod
    def from_estimator(
        cls, estimator: RelishRegressor, X: ArrayLike, y: ArrayLike | None = None, **plotting: Any
    ) -> RefinementDisplay:
        """Make a display of a fitted regressor, and plot it.

        Parameters
        ----------
        estimator : RelishRegressor
            Fitted, of one output.
        X : str, or array-like as in `predict`
            A text, a row, or several.
        y : float or array-like of shape (n_texts,), default=None
            The true numbers; needed for several.
        **plotting
            Arguments of `plot`.

        Returns
        -------
        RefinementDisplay

        Raises
        ------
        ValueError
            If the regressor has several outputs, or there are several texts and no `y`.
        ImportError
            If matplotlib is not installed.
        """
        X = [X] if isinstance(X, str) else X
        if getattr(estimator, "n_outputs_", 1) != 1:
            raise ValueError(
                f"The regressor has {estimator.n_outputs_} outputs: a display is of one."
            )
        stages = np.stack([stage.reshape(-1) for stage in estimator.staged_predict(X)])
        if y is not None:
            y = np.asarray(y, dtype=float).reshape(-1)
            check_consistent_length(stages[0], y)
        if stages.shape[1] == 1:
            (attention,) = estimator.attention(X)
            return cls(stages, attention=attention, y=y).plot(**plotting)
        if y is None:
            raise ValueError("Several texts are shown by their error: pass their numbers as y.")
        return cls(stages, y=y).plot(**plotting)

    def plot(self, *, width: int = 72, max_lines: int = 6, fontsize: float = 9.0) -> Any:
        """Draw it on a new figure.

        Parameters
        ----------
        width : int, default=72
            Characters of a line of text.
        max_lines : int, default=6
            Lines of the text that are shown: of a longer one those that are looked at most.
        fontsize : float, default=9
            Of the text, in points.

        Returns
        -------
        RefinementDisplay

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError(
                "A RefinementDisplay needs matplotlib: pip install 'sklearn-relish[plot]'."
            ) from error
        if self.attention is None:
            self.figure_, axes = pyplot.subplots(figsize=(4.5, 3), layout="constrained")
            self.axes_ = np.array([axes])
            self._plot_errors(axes)
        else:
            lines = _lines(self.attention, width, max_lines)
            self.figure_, self.axes_ = self._plot_text(pyplot, lines, fontsize)
        return self

    def _plot_errors(self, axes: Axes) -> None:
        error = np.abs(self.stages - self.y)  # (n_iterations, n_texts)
        iterations = np.arange(1, len(error) + 1)
        low, high = np.quantile(error, [0.25, 0.75], axis=1)
        axes.fill_between(iterations, low, high, alpha=0.2, linewidth=0, label="middle half")
        axes.plot(iterations, error.mean(axis=1), "o-", label="mean")
        axes.set(xlabel="iteration", ylabel="absolute error", xticks=iterations, ylim=(0, None))
        axes.legend(frameon=False)

    def _plot_text(
        self, pyplot: Any, lines: list[_Line], fontsize: float
    ) -> tuple[Figure, np.ndarray]:
        width = max(sum(token.width for token in line.tokens) for line in lines)
        n_iterations = len(self.stages)
        row = len(lines) + 1  # lines of text an iteration takes, with a gap
        inch = fontsize / 72
        height = n_iterations * row * LINE * inch + 0.75
        text_width, path_width = width * CHARACTER * inch, 2.2
        total = text_width + path_width + 1.1
        figure = pyplot.figure(figsize=(total, height))
        bottom, tall = 0.5 / height, (height - 0.75) / height
        text = figure.add_axes((0.7 / total, bottom, text_width / total, tall))
        path = figure.add_axes((1 - (path_width + 0.1) / total, bottom, path_width / total, tall))
        text.set(xlim=(0, width), ylim=(n_iterations * row - 0.5, -0.5))
        text.set_axis_off()
        shades = pyplot.get_cmap("Blues")
        for iteration in range(n_iterations):
            top = iteration * row
            most = max(token.weights[iteration] for line in lines for token in line.tokens)
            text.text(-1, top, f"{iteration + 1}", ha="right", va="center", fontsize=fontsize)
            for number, line in enumerate(lines):
                y = top + number
                if line.after_gap:
                    text.text(-1, y - 0.5, "⋮", ha="right", va="center", fontsize=fontsize)
                for token in line.tokens:
                    shade = token.weights[iteration] / most
                    text.add_patch(
                        pyplot.Rectangle(
                            (token.column, y - 0.5),
                            token.width,
                            1,
                            facecolor=shades(0.85 * shade),
                            linewidth=0,
                        )
                    )
                    text.text(
                        token.column,
                        y,
                        token.shown,
                        va="center_baseline",
                        family="monospace",
                        fontsize=fontsize,
                        style="italic" if token.special else "normal",
                        color="white" if shade > 0.7 else "0.45" if token.special else "black",
                        parse_math=False,
                    )
        middles = np.arange(n_iterations) * row + (row - 2) / 2
        path.plot(self.stages[:, 0], middles, "o-")
        for place, stage in zip(middles, self.stages[:, 0], strict=True):
            path.annotate(
                f"{stage:.3g}",
                (stage, place),
                (7, 0),
                textcoords="offset points",
                va="center",
                fontsize=fontsize,
            )
        if self.y is not None:
            path.axvline(self.y[0], color="0.4", linestyle="--", linewidth=1)
            path.annotate(
                f"true {self.y[0]:.3g}",
                (self.y[0], 1),
                (0, 2),
                textcoords="offset points",
                xycoords=("data", "axes fraction"),
                ha="center",
                fontsize=fontsize,
                color="0.4",
            )
        path.set(ylim=(n_iterations * row - 0.5, -0.5), xlabel="prediction", yticks=[])
        path.margins(x=0.25)
        path.spines[["left", "right", "top"]].set_visible(False)
        path.tick_params(labelsize=fontsize)
        return figure, np.array([text, path])


class _Token:
    """A piece of the text in its place, and its weight in each iteration."""

    def __init__(self, shown: str, special: bool, weights: np.ndarray) -> None:
        self.shown = shown
        self.special = special
        self.weights = weights
        self.column = 0

    @property
    def width(self) -> int:
        return max(1, len(self.shown))


class _Line:
    """Tokens beside each other."""

    def __init__(self) -> None:
        self.tokens: list[_Token] = []
        self.number = 0
        self.after_gap = False


def _lines(attention: TextAttention, width: int, max_lines: int) -> list[_Line]:
    """The text's lines, as many as are shown: those with the largest weights in any iteration."""
    weights = attention.weights.mean(axis=(0, 2)).T  # (n_tokens, n_iterations)
    lines, before = [_Line()], (0, 0)
    for piece, span, weight in zip(attention.tokens, attention.spans, weights, strict=True):
        begin, end = (int(place) for place in span)
        special = begin == end
        if not special and (begin, end) == before:  # another part of the same character
            lines[-1].tokens[-1].weights = lines[-1].tokens[-1].weights + weight
            continue
        before = (begin, end)
        shown = piece.replace("\n", "⏎").replace("\t", " ")
        used = sum(token.width for token in lines[-1].tokens)
        if lines[-1].tokens and used + len(shown) > width:
            lines.append(_Line())
            used = 0
        token = _Token(shown[:width], special, weight)
        token.column = used
        lines[-1].tokens.append(token)
        if "\n" in piece:
            lines.append(_Line())
    lines = [line for line in lines if line.tokens]
    for number, line in enumerate(lines):
        line.number = number
    peaks = [max(token.weights.max() for token in line.tokens) for line in lines]
    chosen = sorted(np.argsort(peaks)[::-1][:max_lines].tolist())
    for before_it, number in zip([-1, *chosen], chosen, strict=False):
        lines[number].after_gap = number > before_it + 1
    return [lines[number] for number in chosen]
