"""Command line: fit a regressor on a CSV or Parquet file, predict another file, show a folder.

python -m sklearn_relish fit films.csv --target score --output films
python -m sklearn_relish predict films new.parquet --output scores.csv
python -m sklearn_relish info films
"""

from __future__ import annotations

import argparse
import ast
import os
import string
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sklearn_relish

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

SUFFIXES = (".csv", ".parquet")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status.

    Parameters
    ----------
    arguments : sequence of str, default=None
        None: those of the process.
    """
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            options.run(options)
    except (FloatingPointError, ImportError, OSError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sklearn_relish",
        description="Regression on texts with a frozen language model.",
    )
    parser.add_argument("--version", action="version", version=sklearn_relish.__version__)
    commands = parser.add_subparsers(required=True, metavar="command")

    fit = commands.add_parser("fit", help="fit a regressor on a table and save it in a folder")
    fit.set_defaults(run=_fit)
    fit.add_argument("table", type=_table, help="a .csv or .parquet file")
    fit.add_argument("--target", required=True, help="the column of numbers to predict")
    fit.add_argument("--output", required=True, help="the folder to save the regressor in")
    fit.add_argument(
        "--columns",
        nargs="+",
        metavar="COLUMN",
        help="the columns to read; default: those of --prompt, or all but the target",
    )
    fit.add_argument("--prompt", help="a template of the text of a row, such as '{title} ({year})'")
    fit.add_argument("--model", help="Hub id, folder or .gguf file of the language model")
    fit.add_argument("--random-state", type=int, help="makes the fit reproducible")
    fit.add_argument(
        "--set",
        action="append",
        default=[],
        type=_parameter,
        metavar="NAME=VALUE",
        help="another parameter of RelishRegressor; may be repeated",
    )

    predict = commands.add_parser("predict", help="predict the rows of a table, in batches")
    predict.set_defaults(run=_predict)
    predict.add_argument("regressor", help="a saved folder or the id of a Hub repository")
    predict.add_argument("table", type=_table, help="a .csv or .parquet file")
    predict.add_argument(
        "--output",
        required=True,
        type=_table,
        help="the .csv or .parquet file to write, with one prediction for each row of the table",
    )
    predict.add_argument(
        "--columns",
        nargs="+",
        metavar="COLUMN",
        help="the columns to read, in the order of the fit; default: those with the same names",
    )
    predict.add_argument("--model", help="the place of the language model on this machine")
    predict.add_argument(
        "--batch-size", type=_batch_size, default=10_000, help="rows read at a time; 10,000"
    )

    info = commands.add_parser("info", help="show what a saved regressor is")
    info.set_defaults(run=_info)
    info.add_argument("regressor", help="a saved folder or the id of a Hub repository")
    return parser


def _fit(options: argparse.Namespace) -> None:
    given = dict(options.set)
    for name in ("prompt", "model", "random_state"):
        if getattr(options, name) is not None:
            given[name] = getattr(options, name)
    regressor = sklearn_relish.RelishRegressor(verbose=int(sys.stderr.isatty())).set_params(**given)
    (frame,) = _batches(options.table)
    columns = options.columns
    if columns is None and options.prompt is not None:
        fields = [field for _, field, _, _ in string.Formatter().parse(options.prompt)]
        columns = list(dict.fromkeys(field for field in fields if field is not None))
    if columns is None:
        columns = [name for name in frame.columns if name != options.target]
    _check_columns(frame, [options.target, *columns], options.table)
    regressor.fit(frame[columns], frame[options.target])
    regressor.save_pretrained(options.output)
    score = regressor.validation_score_
    quality = "" if score is None else f" R² of the out-of-fold predictions: {score:.3f}."
    print(f"Fitted on {len(frame)} rows and saved in {options.output}.{quality}")


def _predict(options: argparse.Namespace) -> None:
    changes = {} if options.model is None else {"model": options.model}
    regressor = sklearn_relish.RelishRegressor.from_pretrained(options.regressor, **changes)
    regressor.set_params(verbose=int(sys.stderr.isatty()))
    names = list(getattr(regressor, "feature_names_in_", []))
    columns = options.columns or names
    if columns and len(columns) != regressor.n_features_in_:
        raise ValueError(
            f"--columns has {len(columns)} columns, but the regressor was fitted on"
            f" {regressor.n_features_in_}."
        )
    n_rows = 0
    with _writer(options.output) as write:
        dtype = _text_columns(regressor, columns)
        for frame in _batches(options.table, columns, dtype, options.batch_size):
            if not columns and len(frame.columns) != regressor.n_features_in_:
                raise ValueError(
                    f"{options.table} has {len(frame.columns)} columns and the regressor was fitted"
                    f" on {regressor.n_features_in_} without names: pass --columns."
                )
            try:
                write(regressor.predict(_as_fitted(frame, names)))
            except ValueError as error:
                batch = f"rows {n_rows} to {n_rows + len(frame) - 1}"
                raise ValueError(f"{options.table}, in the batch of {batch}: {error}") from error
            n_rows += len(frame)
    print(f"Wrote {n_rows} predictions to {options.output}.")


def _info(options: argparse.Namespace) -> None:
    regressor = sklearn_relish.RelishRegressor.from_pretrained(options.regressor)
    defaults = sklearn_relish.RelishRegressor().get_params()
    heads, score = regressor.head_.heads, regressor.validation_score_
    n_weights = sum(weight.numel() for weight in heads[0].parameters())
    commit = f" at commit {regressor._llm_revision}" if regressor._llm_revision else ""
    columns = zip(regressor._column_names, regressor._column_kinds, strict=True)
    changed = [
        f"{name}={value!r}"
        for name, value in regressor.get_params().items()
        if name not in ("model", "model_kwargs") and repr(value) != repr(defaults[name])
    ]
    lines = {
        "language model": f"{regressor.model}{commit}, layer {regressor.layer_}",
        "columns": ", ".join(f"{name} ({kind})" for name, kind in columns),
        "outputs": regressor.n_outputs_,
        "heads": f"{len(heads)} with {n_weights:,} weights each",
        "ridge models": "no" if regressor.head_.linear is None else "yes",
        "R² of out-of-fold predictions": "none" if score is None else f"{score:.3f}",
        "changed parameters": ", ".join(changed) or "none",
    }
    if Path(options.regressor).is_dir():
        lines["saved with"] = _versions(Path(options.regressor))
    for name, value in lines.items():
        print(f"{name}: {value}")


def _versions(folder: Path) -> str:
    from sklearn_relish.hub.checks import CONFIG, parse_config, read_config
    from sklearn_relish.utils.versions import STAMP

    versions = parse_config(read_config(folder / CONFIG), folder / CONFIG)[STAMP]["versions"]
    return ", ".join(f"{package} {version}" for package, version in versions.items())


def _text_columns(regressor: Any, columns: list[str]) -> Any:
    """The pandas dtype of the columns that were text in the fit, so that ``007`` stays ``007``."""
    if not columns:
        return str if regressor.n_features_in_ == 1 else None
    kinds = dict(zip(columns, regressor._column_kinds, strict=True))
    text_kinds = ("text", "date text", "mixed")
    return {name: str for name, kind in kinds.items() if kind.startswith(text_kinds)}


def _as_fitted(frame: pd.DataFrame, names: list[str]) -> Any:
    """The rows in the form of the fit: a frame, or texts or an array without names."""
    if names:
        return frame.set_axis(names, axis=1)
    return frame.iloc[:, 0].tolist() if len(frame.columns) == 1 else frame.to_numpy(dtype=object)


def _batches(
    path: Path,
    columns: list[str] | None = None,
    dtype: Any = None,
    batch_size: int | None = None,
) -> Iterator[pd.DataFrame]:
    """The rows of a file, in one frame or in batches; `dtype` is for a CSV file."""
    _require("pandas")
    import pandas as pd

    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path.absolute()}.")
    with ExitStack() as stack:
        batches: Iterator[pd.DataFrame]
        if path.suffix == ".csv":
            if columns:
                _check_columns(pd.read_csv(path, nrows=0), columns, path)
            read = pd.read_csv(path, usecols=columns or None, dtype=dtype, chunksize=batch_size)
            batches = iter([read]) if batch_size is None else stack.enter_context(read)
        else:
            _require("pyarrow")
            import pyarrow.parquet as pq

            file = stack.enter_context(pq.ParquetFile(path))
            if columns:
                _check_columns(file.schema_arrow.empty_table().to_pandas(), columns, path)
            if batch_size is None:
                batches = iter([file.read().to_pandas()])
            else:
                read = file.iter_batches(batch_size, columns=columns or None)
                batches = (batch.to_pandas() for batch in read)
        for batch in batches:
            yield batch[columns] if columns else batch


@contextmanager
def _writer(path: Path) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that appends predictions to a file, which appears when all are written."""
    _require("pandas")
    import pandas as pd

    partial = path.with_name(f".{path.name}.partial")
    try:
        with ExitStack() as stack:
            writers: list[Any] = []  # opened with the first predictions, which give the columns

            def write(predictions: np.ndarray) -> None:
                if predictions.ndim == 1:
                    columns = {"prediction": predictions}
                else:
                    columns = {f"prediction_{i}": column for i, column in enumerate(predictions.T)}
                frame = pd.DataFrame(columns)
                if path.suffix == ".csv":
                    frame.to_csv(partial, index=False, mode="a", header=not writers)
                    writers.append(partial)
                    return
                _require("pyarrow")
                import pyarrow as pa
                import pyarrow.parquet as pq

                batch = pa.Table.from_pandas(frame, preserve_index=False)
                if not writers:
                    writers.append(stack.enter_context(pq.ParquetWriter(partial, batch.schema)))
                writers[0].write_table(batch)

            partial.unlink(missing_ok=True)
            yield write
        if not writers:
            raise ValueError("The table has no rows.")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _check_columns(frame: pd.DataFrame, wanted: list[str], path: Path) -> None:
    missing = [name for name in wanted if name not in frame.columns]
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(map(repr, missing))}; its columns are"
            f" {', '.join(map(repr, frame.columns))}."
        )


def _require(package: str) -> None:
    if find_spec(package) is None:
        raise ImportError(
            f"The command line needs {package} for this file: pip install 'sklearn-relish[cli]'"
        )


def _table(text: str) -> Path:
    path = Path(text)
    if path.suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a .csv nor a .parquet file")
    return path


def _batch_size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rows")
    return int(text)


def _parameter(text: str) -> tuple[str, Any]:
    """The name and the value of ``NAME=VALUE``; what is no Python literal is a string."""
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
