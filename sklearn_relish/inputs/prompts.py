"""Rows to texts: what a language model reads for each row of `X`.

A list of strings is used unchanged. Rows of several columns become ``column: value`` lines, or are
filled into a template. `cells` decides on the text of each value.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, MappingView, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import narwhals.stable.v2 as nw
import numpy as np
from scipy.sparse import issparse

from sklearn_relish.inputs.cells import OR_MISSING, column_texts, is_missing
from sklearn_relish.utils.messages import name_rows

# Kinds of columns, see `column_texts`, that are not one of the two texts of a pair.
NO_TEXTS = {"integer", "number", "boolean", "date", "date text", "time", "duration"}


@dataclass(frozen=True)
class Table:
    """The columns of an input.

    Parameters
    ----------
    columns : sequence of sequences
        Cells by column, each of length `n_rows`.
    names : list of str
        Names of the columns; ``text`` for one-dimensional texts, ``x0``, ``x1``, ... for
        arrays and for frames whose names are not all strings, as in scikit-learn.
    n_rows : int
    one_dimensional : bool
        Whether the input was one-dimensional texts, which are never converted.
    """

    columns: Sequence[Sequence[Any]]
    names: list[str]
    n_rows: int
    one_dimensional: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows, number of columns."""
        return self.n_rows, len(self.columns)


def read_table(X: Any) -> Table:
    """Columns of texts or of a table, checked.

    Parameters
    ----------
    X : sequence of str, array, Series, data frame or dict
        One-dimensional input has one text for each row. Two-dimensional input has columns: a NumPy
        array, nested lists, a frame of pandas, Polars or another library that Narwhals supports, or
        a dict of columns.

    Returns
    -------
    Table

    Raises
    ------
    ValueError, TypeError
        If `X` is not such an input; the message names the rows.
    """
    if isinstance(X, (str, bytes)):
        raise ValueError(
            f"X is a single {type(X).__name__}: pass a list of texts, [text] for one text."
        )
    if issparse(X):
        raise TypeError("X is sparse: a language model reads texts or a dense table.")
    if isinstance(X, Mapping):
        return _checked_table(_read_dict(X))
    frame = nw.from_native(X, pass_through=True, allow_series=True)
    if isinstance(frame, nw.LazyFrame):
        raise TypeError("X is a lazy frame: collect it first.")
    if isinstance(frame, nw.DataFrame):
        # iter_columns gives the stable Series, but its annotation names the other one.
        columns = [_frame_cells(column) for column in frame.iter_columns()]  # type: ignore[arg-type]
        names = list(frame.columns)
        if not all(isinstance(name, str) for name in names):
            names = _array_names(len(names))
        table = Table(columns, names, len(frame))
    else:
        table = _read_array(frame.to_list() if isinstance(frame, nw.Series) else X)
    return _checked_table(table)


def record_batch_to_frame(X: Any) -> Any:
    """An Arrow record batch as a frame; anything else unchanged."""
    if hasattr(X, "__arrow_c_stream__") and type(X).__name__ == "RecordBatch":
        return nw.from_arrow(X, backend="pyarrow").to_native()
    return X


def _checked_table(table: Table) -> Table:
    if table.n_rows == 0:
        raise ValueError(f"Found array with 0 sample(s) (shape={table.shape}): X has no rows.")
    if not table.columns:
        raise ValueError(
            f"Found array with 0 feature(s) (shape={table.shape}) while a minimum of 1 is required."
        )
    return table


def _frame_cells(column: nw.Series[Any]) -> list[Any]:
    """The cells of a frame's column, without rounding."""
    if column.dtype == nw.Float32:  # to_list() gives float64
        return [None if is_missing(cell) else np.float32(cell) for cell in column.to_list()]
    if column.dtype == nw.Datetime("ns"):  # Python's datetime has no nanoseconds
        return list(column.to_numpy())
    return column.to_list()


def _read_dict(X: Mapping[str, Any]) -> Table:
    """A dict of columns, as batches of `datasets` and of Ray are."""
    names = list(X)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"X is a dict with the keys {names!r}: the names of columns are strings.")
    columns = [_dict_cells(X[name], name) for name in names]
    lengths = {name: len(column) for name, column in zip(names, columns, strict=True)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"X is a dict whose columns differ in length: {lengths}.")
    return Table(columns, names, len(columns[0]) if columns else 0)


def _dict_cells(column: Any, name: str) -> Sequence[Any]:
    series = nw.from_native(column, pass_through=True, allow_series=True)
    if isinstance(series, nw.Series):
        return _frame_cells(series)
    if hasattr(column, "__array__") and np.ndim(column) == 1:
        return _read_array(column[:, None]).columns[0]
    if isinstance(column, (str, bytes, Mapping)) or not isinstance(column, Sequence):
        raise TypeError(
            f"X is a dict, and {name!r} is a {type(column).__name__}: a dict has a list or an array"
            " of cells for each column."
        )
    return column


def _read_array(X: Any) -> Table:
    if hasattr(X, "__array__"):
        array = X if isinstance(X, np.ma.MaskedArray) else np.asarray(X)
        if isinstance(array, np.ma.MaskedArray):
            cells = np.empty(array.shape, dtype=object)
            cells.flat[:] = list(array.data.flat)  # NumPy's scalars keep nanoseconds
            cells[np.ma.getmaskarray(array)] = None
            array = cells
        if array.ndim == 2:
            _refuse_complex(array)
            exact = array.dtype.kind in "mM" or array.dtype in (np.float16, np.float32)
            columns = [list(column) if exact else column.tolist() for column in array.T]
            return Table(columns, _array_names(len(columns)), len(array))
        if array.ndim != 1:
            raise ValueError(
                f"X has {array.ndim} dimensions: expected texts in one dimension, or two dimensions"
                " of rows and columns."
            )
        X = array.tolist()
    elif not (hasattr(X, "__len__") and hasattr(X, "__iter__")) or isinstance(
        X, (MappingView, Set)
    ):
        raise TypeError(
            f"X is a {type(X).__name__}: expected a list of texts, an array or a frame,"
            " whose rows have an order."
        )
    else:
        X = list(X)
        if X and all(isinstance(row, (list, tuple, np.ndarray)) for row in X):
            widths = {len(row) for row in X}
            if len(widths) > 1:
                raise ValueError(f"X has rows of {min(widths)} to {max(widths)} columns.")
            return _read_array(np.array(X, dtype=object))
    return Table([_checked_texts(X)], ["text"], len(X), one_dimensional=True)


def _array_names(n_columns: int) -> list[str]:
    """Names for unnamed columns, as in scikit-learn."""
    return [f"x{i}" for i in range(n_columns)]


def _refuse_complex(array: np.ndarray) -> None:
    if np.iscomplexobj(array):
        raise ValueError(f"Complex data not supported: X has dtype {array.dtype}.")


def _checked_texts(texts: list[Any]) -> list[str]:
    """Texts of one-dimensional input, checked to be strings."""
    if all(isinstance(text, str) for text in texts):
        return texts
    missing = [row for row, text in enumerate(texts) if is_missing(text)]
    if missing:
        raise ValueError(
            f"X has missing texts in {name_rows(missing)}: drop these rows, or put '' where a"
            " missing text means an empty one."
        )
    wrong = [row for row, text in enumerate(texts) if not isinstance(text, str)]
    row, kind = wrong[0], type(texts[wrong[0]]).__name__
    if isinstance(texts[row], dict):
        raise TypeError(
            f"X holds a dict in {name_rows(wrong)}: pass a frame, such as pandas.DataFrame(X) or a"
            " Dataset's to_pandas(), a dict of columns, such as X[:], or one column of texts."
        )
    if isinstance(texts[row], bytes):
        raise TypeError(f"X has bytes in {name_rows(wrong)}: decode them first, bytes.decode().")
    raise ValueError(
        f"X is one-dimensional and holds no text in {name_rows(wrong)} (row {row} is a {kind})."
        " Texts must be strings. Reshape your data if these are numbers: X.reshape(-1, 1) if it is"
        " a single column, X.reshape(1, -1) if it is a single row."
    )


def write_cells(table: Table, kinds: Sequence[str] | None = None) -> tuple[Table, list[str]]:
    """The table with its cells as texts, and the kinds of its columns.

    Parameters
    ----------
    table : Table
    kinds : sequence of str, default=None
        Kinds of the columns in `fit`; cells are converted to them. None: they are inferred.

    Returns
    -------
    table : Table
        Its cells are strings, or None if they are missing.
    kinds : list of str
        See `cells.column_texts`, which also has the errors and warnings.
    """
    if kinds is None and table.one_dimensional:
        return table, ["mixed"]  # texts, or other cells, which are written as they are
    fitted_kinds: Sequence[str | None] = kinds or [None] * len(table.columns)
    written = [
        column_texts(column, name, kind)
        for column, name, kind in zip(table.columns, table.names, fitted_kinds, strict=True)
    ]
    columns, kinds = [texts for texts, _ in written], [kind for _, kind in written]
    return replace(table, columns=columns), kinds


def render(table: Table, names: Sequence[str], prompt: str | None) -> list[str]:
    r"""The text of each row.

    Parameters
    ----------
    table : Table
        With texts as cells, see `write_cells`.
    names : sequence of str
        Names of the columns in the text.
    prompt : str or None
        A template with a ``{name}`` for each column that it uses. None: the cell itself if there
        is one column, else a line ``name: value`` for each cell that is not missing.

    Returns
    -------
    list of str
        A missing cell has no line; in a template it is an empty string.

    Raises
    ------
    ValueError
        If the template names a column that does not exist, or all cells of a row are missing in
        the columns that are used.

    Examples
    --------
    >>> table, _ = write_cells(read_table([["Alien", 1979], ["Solaris", None]]))
    >>> print(render(table, ["title", "year"], None))
    ['title: Alien\nyear: 1979', 'title: Solaris']
    >>> render(table, ["title", "year"], "{title} ({year})")
    ['Alien (1979)', 'Solaris ()']
    """
    columns = table.columns
    pieces = [] if prompt is None else parse_prompt(prompt, names)
    used = columns if prompt is None else [columns[i] for _, i in pieces if i is not None]
    empty = [
        row for row, cells in enumerate(zip(*used, strict=True)) if cells.count(None) == len(cells)
    ]
    if empty:
        kind = "column" if prompt is None else "column of the prompt"
        raise ValueError(
            f"X has missing texts in {name_rows(empty)}, where no {kind} has a cell: drop these"
            " rows, or put '' where a missing text means an empty one."
        )
    if prompt is not None:
        texts = [
            "".join(
                literal + (row[column] or "" if column is not None else "")
                for literal, column in pieces
            )
            for row in zip(*columns, strict=True)
        ]
    elif len(columns) == 1:
        texts = [cell or "" for cell in columns[0]]
    else:
        texts = [
            "\n".join(
                f"{name}: {cell}" for name, cell in zip(names, row, strict=True) if cell is not None
            )
            for row in zip(*columns, strict=True)
        ]
    broken = [row for row, text in enumerate(texts) if not _is_unicode(text)]
    if broken:
        raise ValueError(
            f"X has lone surrogates, which are no Unicode text, in {name_rows(broken)}: clean them,"
            " text.encode('utf-8', 'replace').decode()."
        )
    return texts


def parse_prompt(prompt: str, names: Sequence[str]) -> list[tuple[str, int | None]]:
    """Pieces of a template: a literal, and the index of the column after it or None.

    Raises
    ------
    ValueError
        If a field is not the name of a column, or no column is used.
    """
    try:
        parts = list(string.Formatter().parse(prompt))
    except ValueError as error:
        raise ValueError(f"prompt={prompt!r} is not a template: {error}.") from None
    formatted = [field for _, field, spec, conversion in parts if spec or conversion]
    if formatted:
        raise ValueError(
            f"prompt={prompt!r} formats {formatted[0]!r}: cells are inserted unchanged, so a"
            " field can only be a name: format the column first."
        )
    parsed = [(literal, field) for literal, field, _, _ in parts]
    fields = [field for _, field in parsed if field is not None]
    unknown = [field for field in fields if field not in names]
    if unknown or not fields:
        problem = f"names {{{unknown[0]}}}, which is no column" if unknown else "names no column"
        raise ValueError(
            f"prompt={prompt!r} {problem}: the columns are {', '.join(map(repr, names))}. Double a"
            " brace that belongs to the text."
        )
    index = {name: i for i, name in enumerate(names)}
    return [(literal, None if field is None else index[field]) for literal, field in parsed]


def pair_columns(names: Sequence[str], prompt: str) -> list[int]:
    """The numbers of the columns of a prompt, in the order in which it has them.

    Examples
    --------
    >>> pair_columns(["a", "b"], "{b} means {a}.")
    [1, 0]
    """
    return [column for _, column in parse_prompt(prompt, names) if column is not None]


def pair_literals(
    names: Sequence[str], kinds: Sequence[str], prompt: str | None
) -> tuple[str, str, str] | None:
    r"""What stands before, between and after two columns of texts in the text of a row.

    Parameters
    ----------
    names, kinds : sequence of str
        Names and kinds of the columns.
    prompt : str or None
        As of `render`.

    Returns
    -------
    tuple of (str, str, str), or None
        None if the text is not made of exactly two columns, each used once, if one of them has
        numbers or dates, or if nothing but spaces is between them: then it is not clear where the
        first one ends.

    Examples
    --------
    >>> pair_literals(["source", "target"], ["text", "text"], None)
    ('source: ', '\ntarget: ', '')
    >>> pair_literals(["a", "b"], ["text", "text"], "{b} means {a}.")
    ('', ' means ', '.')
    """
    pieces: list[tuple[str, int | None]]
    if prompt is None:
        pieces = [(("\n" if i else "") + f"{name}: ", i) for i, name in enumerate(names)]
    else:
        pieces = parse_prompt(prompt, names)
    literals, used = [""], []
    for literal, column in pieces:
        literals[-1] += literal
        if column is not None:
            used.append(column)
            literals.append("")
    is_pair = len(used) == len(set(used)) == 2 and not any(
        kinds[column].removesuffix(OR_MISSING) in NO_TEXTS for column in used
    )
    if not (is_pair and (literals[1].strip() or "\n" in literals[1])):
        return None
    before, between, after = literals
    return before, between, after


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
