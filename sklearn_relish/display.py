"""`RefinementDisplay`: plots of attention, predictions and errors after each iteration."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils import check_consistent_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sklearn_relish.predictor import RelishPredictor, TextAttention

CHARACTER = 0.602  # width of a monospaced character, in font sizes
LINE = 1.45  # height of a line, in font sizes
PATH_INCHES = 2.2  # width of the axes of the predictions
NO_TARGETS = "The display of several texts shows their error: pass their targets as y."


class RefinementDisplay:
    """How predictions are refined, iteration by iteration.

    For one text: the text with its tokens shaded by attention, one row per iteration, and the
    prediction after each iteration. For several texts with known targets: the error by iteration.
    Create it with `from_estimator`.

    The shade of a token is its attention weight, averaged over heads and estimators, relative to
    the largest weight of the text in any iteration. The predictions include the linear path, which
    does not attend to tokens.

    Parameters
    ----------
    stages : ndarray of shape (n_iterations, n_texts)
        Prediction after each iteration, in the units of the target.
    attention : TextAttention, default=None
        Attention to a single text, see `RelishRegressor.attention`.
    y : ndarray of shape (n_texts,), default=None
        True targets; required without `attention`.

    Attributes
    ----------
    figure_ : matplotlib.figure.Figure
        The figure, after plotting.
    axes_ : ndarray of matplotlib.axes.Axes
        For one text, the axes of the text and of the predictions; for several, of the error.
    line_ : matplotlib.lines.Line2D
        The predictions of one text, or the mean error of several.

    Raises
    ------
    ValueError
        If both `attention` and `y` are None.

    See Also
    --------
    RelishRegressor.staged_predict : The predictions after each iteration.
    RelishRegressor.attention : The weights of the tokens.

    Examples
    --------
    >>> from sklearn_relish import RefinementDisplay, RelishRegressor
    >>> regressor = RelishRegressor(random_state=0).fit(["dull", "fine"] * 20, [1, 3] * 20)
    >>> display = RefinementDisplay.from_estimator(regressor, "A dull film.", y=1)
    >>> display.figure_.savefig("film.svg")
    """

    def __init__(
        self,
        stages: np.ndarray,
        *,
        attention: TextAttention | None = None,
        y: np.ndarray | None = None,
    ) -> None:
        if attention is None and y is None:
            raise ValueError(NO_TARGETS)
        self.stages = stages
        self.attention = attention
        self.y = y

    @classmethod
    def from_estimator(
        cls,
        estimator: RelishPredictor,
        X: Any,
        y: ArrayLike | None = None,
        *,
        ax: Axes | Sequence[Axes] | None = None,
        width: int = 72,
        max_lines: int = 6,
        fontsize: float = 9.0,
    ) -> RefinementDisplay:
        """Create a display from a fitted regressor and plot it.

        Parameters
        ----------
        estimator : RelishRegressor
            A fitted regressor with one output.
        X : str, or array-like as in `predict`
            One text or row, or several.
        y : float or array-like of shape (n_texts,), default=None
            True targets; required for several texts.
        ax, width, max_lines, fontsize
            As in `plot`.

        Returns
        -------
        RefinementDisplay

        Raises
        ------
        ValueError
            If the regressor has several outputs, or there are several texts and no `y`.
        ImportError
            If matplotlib is not installed.

        Examples
        --------
        The error of several texts by iteration:

        >>> from sklearn_relish import RefinementDisplay, RelishRegressor
        >>> texts, y = ["dull", "fine", "splendid"] * 20, [1, 3, 5] * 20
        >>> regressor = RelishRegressor(random_state=0).fit(texts, y)
        >>> display = RefinementDisplay.from_estimator(regressor, texts, y)
        """
        _pyplot()
        X = [X] if isinstance(X, str) else X
        if getattr(estimator, "n_outputs_", 1) != 1:
            raise ValueError(
                f"The regressor has {estimator.n_outputs_} outputs, but a display shows one."
            )
        if y is not None:
            y = np.asarray(y, dtype=float).reshape(-1)
            check_consistent_length(X, y)
        if len(X) == 1:
            (attention,) = estimator.attention(X)
        else:
            attention = None
            if y is None:
                raise ValueError(NO_TARGETS)
        stages = np.stack([stage.reshape(-1) for stage in estimator.staged_predict(X)])
        display = cls(stages, attention=attention, y=y)
        return display.plot(ax=ax, width=width, max_lines=max_lines, fontsize=fontsize)

    def plot(
        self,
        *,
        ax: Axes | Sequence[Axes] | None = None,
        width: int = 72,
        max_lines: int = 6,
        fontsize: float = 9.0,
    ) -> RefinementDisplay:
        """Plot the display.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, or two of them, default=None
            For one text two axes, for the text and the predictions; for several texts one. None: a
            new figure that fits the text.
        width : int, default=72
            Characters per line of text.
        max_lines : int, default=6
            Number of lines shown. Of a longer text, the lines with the largest weights are shown,
            with ⋮ where lines are left out.
        fontsize : float, default=9
            Font size of the text, in points.

        Returns
        -------
        RefinementDisplay

        Raises
        ------
        ValueError
            If `width` or `max_lines` is below 1.
        ImportError
            If matplotlib is not installed.

        Examples
        --------
        Predictions of two texts after three iterations, from elsewhere:

        >>> import numpy as np
        >>> from sklearn_relish import RefinementDisplay
        >>> stages = np.array([[2.0, 2.5], [1.5, 3.5], [1.1, 4.8]])
        >>> display = RefinementDisplay(stages, y=np.array([1.0, 5.0])).plot()
        >>> display.axes_[0].get_xlabel()
        'iteration'
        """
        pyplot = _pyplot()
        if min(width, max_lines) < 1:
            raise ValueError(
                f"width and max_lines must be 1 or more, got {width} and {max_lines}: nothing would"
                " be shown."
            )
        if self.attention is None:
            if ax is None:
                _, ax = pyplot.subplots(figsize=(4.5, 3), layout="constrained")
            self.axes_ = np.array([ax])
            self._plot_errors(self.axes_[0])
        else:
            lines = _lines(self.attention, width, max_lines)
            if ax is None:
                ax = _new_axes(pyplot, lines, len(self.stages), fontsize)
            self.axes_ = np.array(ax)
            self._plot_text(self.axes_[0], self.attention, lines, fontsize)
            self._plot_path(self.axes_[1], len(lines), fontsize)
        self.figure_ = self.axes_[0].figure
        return self

    def _plot_errors(self, axes: Axes) -> None:
        error = np.abs(self.stages - self.y)  # (n_iterations, n_texts)
        iterations = np.arange(1, len(error) + 1)
        low, high = np.quantile(error, [0.25, 0.75], axis=1)
        axes.fill_between(iterations, low, high, alpha=0.2, linewidth=0, label="middle half")
        (self.line_,) = axes.plot(iterations, error.mean(axis=1), "o-", label="mean")
        axes.set(xlabel="iteration", ylabel="absolute error", xticks=iterations, ylim=(0, None))
        axes.legend(frameon=False)

    def _plot_text(
        self, axes: Axes, attention: TextAttention, lines: list[_Line], fontsize: float
    ) -> None:
        from matplotlib import colormaps, rcParams
        from matplotlib.patches import Rectangle

        row = len(lines) + 1  # lines that an iteration takes, with a gap
        axes.set(
            xlim=(0, max(line.columns for line in lines)),
            ylim=(len(self.stages) * row - 0.5, -0.5),
        )
        axes.set_axis_off()
        most = attention.weights.mean(axis=(0, 2)).max()
        family = [
            "monospace",
            *rcParams["font.family"],
        ]  # more fonts for what monospace lacks
        margin_text: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": fontsize}
        for iteration in range(len(self.stages)):
            top = iteration * row
            axes.text(-1, top, f"{iteration + 1}", **margin_text)
            if lines[-1].left_out_after:
                axes.text(-1, top + len(lines) - 0.5, "⋮", **margin_text)
            for y, line in enumerate(lines, top):
                if line.left_out_before:
                    axes.text(-1, y - 0.5, "⋮", **margin_text)
                for piece in line.pieces:
                    shade = min(1.0, piece.weights[iteration] / most)
                    corner = (piece.column, y - 0.5)
                    color = colormaps["Blues"](0.85 * shade)
                    axes.add_patch(
                        Rectangle(corner, piece.columns, 1, facecolor=color, linewidth=0)
                    )
                    axes.text(
                        piece.column,
                        y,
                        piece.shown,
                        va="center_baseline",
                        family=family,
                        fontsize=fontsize,
                        style="italic" if piece.special else "normal",
                        color="white" if shade > 0.7 else "0.45" if piece.special else "black",
                        parse_math=False,
                    )

    def _plot_path(self, axes: Axes, n_lines: int, fontsize: float) -> None:
        stages = self.stages[:, 0]
        row = n_lines + 1
        middles = np.arange(len(stages)) * row + (n_lines - 1) / 2
        (self.line_,) = axes.plot(stages, middles, "o-")
        for place, stage in zip(middles, stages, strict=True):
            axes.annotate(
                f"{stage:.{_decimals(stages)}f}",
                (stage, place),
                (7, 0),
                textcoords="offset points",
                va="center",
                fontsize=fontsize,
            )
        values = [*stages]
        if self.y is not None:
            values.append(self.y[0])
            axes.axvline(self.y[0], color="0.4", linestyle="--", linewidth=1, zorder=0)
            axes.annotate(
                f"true {self.y[0]:g}",
                (self.y[0], 1),
                (0, 2),
                textcoords="offset points",
                xycoords=("data", "axes fraction"),
                ha="center",
                fontsize=fontsize,
                color="0.4",
            )
        low, high = min(values), max(values)
        room = (high - low) or abs(high) or 1.0
        axes.set(
            xlim=(low - 0.15 * room, high + 0.5 * room),
            ylim=(len(stages) * row - 0.5, -0.5),
            xlabel="prediction",
            yticks=[],
        )
        axes.spines[["left", "right", "top"]].set_visible(False)
        axes.tick_params(labelsize=fontsize)


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "A RefinementDisplay needs matplotlib: pip install 'sklearn-relish[plot]'."
        ) from error
    return pyplot


def _new_axes(
    pyplot: Any, lines: list[_Line], n_iterations: int, fontsize: float
) -> tuple[Axes, Axes]:
    """Axes for a text and its predictions, on a figure sized so that each character fits."""
    inch = fontsize / 72
    below, above, left, between = 0.5, 0.25, 0.4, 0.4  # inches
    tall = n_iterations * (len(lines) + 1) * LINE * inch
    wide = max(line.columns for line in lines) * CHARACTER * inch
    height, width = below + tall + above, left + wide + between + PATH_INCHES + 0.1
    figure: Figure = pyplot.figure(figsize=(width, height))
    text = figure.add_axes((left / width, below / height, wide / width, tall / height))
    start = (left + wide + between) / width
    path = figure.add_axes((start, below / height, PATH_INCHES / width, tall / height))
    return text, path


def _decimals(stages: np.ndarray) -> int:
    """Decimals that distinguish the stages."""
    spread = float(np.ptp(stages)) or float(np.abs(stages).max()) or 1.0
    return min(max(0, 1 - math.floor(math.log10(spread))), 12)


@dataclass
class _Piece:
    """A part of the text in a line, and its weight in each iteration."""

    shown: str
    weights: np.ndarray
    special: bool
    column: int = 0

    @property
    def columns(self) -> int:
        return sum(_columns(character) for character in self.shown)


@dataclass
class _Line:
    """A line of the text."""

    pieces: list[_Piece]
    left_out_before: bool = False
    left_out_after: bool = False

    @property
    def columns(self) -> int:
        return sum(piece.columns for piece in self.pieces)


def _columns(character: str) -> int:
    """Width of a character, in columns."""
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _shown(text: str) -> str:
    """The text with visible symbols for line breaks and white space."""
    return "".join(
        "⏎" if character == "\n" else " " if character.isspace() else character
        for character in text
        if character != "\r" and unicodedata.category(character) != "Cs"
    )


def _pieces(attention: TextAttention) -> list[_Piece]:
    """The text from its first token to its last, each character once.

    A character that several tokens share is in the piece of the first token, and their weights are
    added to its weight. Characters between tokens have a weight of 0.
    """
    text, pieces, end_of_last = attention.text, [], None
    weights = attention.weights.mean(axis=(0, 2)).T  # (n_tokens, n_iterations)
    for name, (begin, end), weight in zip(attention.tokens, attention.spans, weights, strict=True):
        if begin == end:
            pieces.append(_Piece(name, weight, special=True))
            continue
        if end_of_last is not None and begin > end_of_last:
            pieces.append(_Piece(text[end_of_last:begin], np.zeros_like(weight), special=False))
        new = max(begin, end_of_last or 0)
        if end > new:
            pieces.append(_Piece(text[new:end], weight, special=False))
        else:
            pieces[-1].weights = pieces[-1].weights + weight
        end_of_last = max(end, end_of_last or 0)
    return pieces


def _lines(attention: TextAttention, width: int, max_lines: int) -> list[_Line]:
    """The lines to show: those with the largest weights in any iteration."""
    lines = [_Line([])]
    for piece in _pieces(attention):
        for part in piece.shown.splitlines(keepends=True) or [""]:
            for start in range(0, len(part), width):
                chunk = _shown(part[start : start + width])
                line = lines[-1]
                laid = _Piece(chunk, piece.weights, piece.special, line.columns)
                if line.pieces and line.columns + laid.columns > width:
                    lines.append(_Line([]))
                    laid.column = 0
                lines[-1].pieces.append(laid)
            if part.endswith("\n"):
                lines.append(_Line([]))
    lines = [line for line in lines if line.pieces]
    peaks = np.array([max(piece.weights.max() for piece in line.pieces) for line in lines])
    chosen = np.sort(np.argsort(-peaks, kind="stable")[:max_lines])
    spans = attention.spans[attention.spans[:, 0] < attention.spans[:, 1]]
    cut_before = len(spans) > 0 and bool(attention.text[: spans[0, 0]].strip())
    cut_after = len(spans) > 0 and bool(attention.text[spans[-1, 1] :].strip())
    for before, number in zip([-1, *chosen], chosen, strict=False):
        lines[number].left_out_before = bool(number > before + 1)
    lines[chosen[0]].left_out_before |= cut_before
    lines[chosen[-1]].left_out_after = bool(chosen[-1] < len(lines) - 1) or cut_after
    return [lines[number] for number in chosen]
