"""Write the tables of accuracy in guide and README from the lines of evaluation.jsonl.

    python benchmarks/figures.py

evaluation.py makes the lines. A table stands between the comments ``<!-- table: NAME -->`` and
``<!-- end of table -->``. ``--check`` writes nothing, and fails if a table differs from the lines.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation import (
    BOTH_ORDERS,
    COUNTED,
    OURS,
    PUBLISHED,
    SHOTS,
    TASKS,
    TEST_ROWS,
    Results,
    find_method,
    has_all_rows,
    settings_of,
)

from sklearn_relish import RelishRegressor

if TYPE_CHECKING:
    import pandas as pd

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "docs" / "guide" / "accuracy.md", ROOT / "README.md"]
LINES = ROOT / "benchmarks" / "evaluation.jsonl"
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

TITLES = {
    "stsb": "STS-B",
    "sickr": "SICK-R",
    "wmt-en-zh": "WMT en-zh",
    "wmt-ru-en": "WMT ru-en",
    "wmt-si-en": "WMT si-en",
}
SPEAKING = ["zero-shot", f"{SHOTS}-shot"]
SHORT = [OURS, BOTH_ORDERS, "ridge, mean of states", "MLP, mean of states", PUBLISHED, COUNTED]
ENGLISH = ["stsb", "sickr"]
ENCODERS = ["sentence embeddings + boosting", "sentence embeddings + ridge", "cross-encoder"]
OF_CELLS = ["prompt", "template", "kw_args", "instruction", "decimals", "random_state"]
OF_CELLS += ["max_seconds"]
TUNED = re.compile(r"LoRA|RAFT|cross-encoder")


def label(method: str) -> str:
    """A method's name in a table."""
    name = method.replace(OURS, "`RelishRegressor`") if method != PUBLISHED else method
    return f"number decoded, {name}" if name in SPEAKING else name


def grid(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def complete_rows(lines: pd.DataFrame) -> pd.DataFrame:
    """The lines that have all training rows of their set."""
    return lines[lines["draw"].isna() & has_all_rows(lines)]


def means(lines: pd.DataFrame, value: str = "r") -> pd.DataFrame:
    """A row for each method and a column for each cell (model, set): the mean of the seeds."""
    import pandas as pd

    cells = pd.MultiIndex.from_product([lines["model"].unique(), TASKS], names=["model", "set"])
    return lines.pivot_table(value, "method", ["model", "set"], sort=False).reindex(columns=cells)


def ordered(cells: pd.DataFrame) -> list[str]:
    """The methods, the highest mean first; those that lack a cell come last."""
    mean = cells.mean(axis=1, skipna=False).fillna(cells.mean(axis=1) - 1000)
    return list(mean.sort_values(ascending=False).index)


def numbers(cells: pd.DataFrame, method: str, name: str) -> str:
    """The figures of a method on a set, one for each model; the highest of several is bold."""
    shown = []
    for model in cells.columns.unique("model"):
        value = cells[model, name]
        text = f"{value[method]:.1f}" if value.notna()[method] else "-"
        best = value.count() > 1 and text == f"{value.max():.1f}"
        shown.append(f"**{text}**" if best else text)
    return shown[0] if not find_method(method).uses_llm else " / ".join(shown)


def average(values: pd.Series) -> str:
    """The mean of all cells, or a dash if one is missing."""
    return f"{values.mean():.1f}" if values.notna().all() else "-"


def short(lines: pd.DataFrame) -> str:
    """100 r of a few methods."""
    cells = means(complete_rows(lines[lines["method"].isin(SHORT)]))
    rows = []
    for method in ordered(cells):
        shown = [numbers(cells, method, name) for name in TASKS]
        rows.append([label(method), *shown, average(cells.loc[method])])
    return grid(["", *TITLES.values(), "mean"], rows)


def complete(lines: pd.DataFrame) -> str:
    """All methods that are not fine-tuned and read any language."""
    lines = complete_rows(lines)
    lines = lines[~lines["method"].str.contains(TUNED) & ~lines["method"].isin(ENCODERS)]
    lines = lines.assign(seconds=lines["reading_seconds"] + lines["fit_seconds"])
    cells = means(lines)
    others = [means(lines, value) for value in ("rho", "nrmse")]
    cost = lines.groupby("method")[["seconds", "parameters"]].median()
    rows = []
    for method in ordered(cells):
        own = lines[lines["method"] == method]
        n_test = own["test_rows"].max()
        name = label(method) + (f" ({n_test} test rows)" if n_test < TEST_ROWS else "")
        rows.append(
            [name, *(numbers(cells, method, name) for name in TASKS)]
            + [average(some.loc[method]) for some in (cells, *others)]
            + [f"{cost.loc[method, 'seconds']:.0f}", f"{cost.loc[method, 'parameters']:,.0f}"]
            + [str(own["seed"].nunique())]
        )
    header = ["", *TITLES.values(), "r", "rho", "NRMSE", "seconds", "weights", "seeds"]
    return grid(header, rows)


def summary(lines: pd.DataFrame) -> str:
    """How far the default is ahead of the best rival of a cell, and both orders of one order."""
    lines = complete_rows(lines)
    frozen = [name for name in lines["method"].unique() if is_frozen_rival(name)]
    cells, errors = means(lines), means(lines, "nrmse")
    ahead = (cells.loc[OURS] - cells.loc[frozen].max()).dropna()
    lowest = errors.loc[frozen].min()
    error = (errors.loc[OURS] / lowest).dropna()
    of_sets = error.groupby("set", sort=False).mean()
    in_both_orders = ""
    if BOTH_ORDERS in errors.index:
        ratio = (errors.loc[BOTH_ORDERS] / lowest).mean()
        in_both_orders = f" With both orders: {ratio:.2f} on average."
    text = (
        "Rivals are the methods of this table but `RelishRegressor`. 100 r of `RelishRegressor`"
        f" minus that of the best rival in each cell: {spread(ahead)}; ahead in"
        f" {(ahead > 0).sum()} of {len(ahead)} cells. Its NRMSE, divided by the lowest of a rival:"
        f" {error.mean():.2f} on average; "
        + ", ".join(f"{TITLES[name]} {value:.2f}" for name, value in of_sets.items())
        + f".{in_both_orders}"
    )
    differences = {
        "100 r of `RelishRegressor` minus that of the published configuration": (OURS, PUBLISHED),
        "100 r with both orders of a pair minus 100 r with one": (BOTH_ORDERS, OURS),
    }
    for name, (method, other) in differences.items():
        if {method, other} <= set(cells.index):
            values = (cells.loc[method] - cells.loc[other]).dropna()
            text += f" {name}, in {len(values)} cells: {spread(values)}."
    return text


def spread(differences: pd.Series) -> str:
    """The lowest, the highest and the mean difference."""
    lowest, highest, mean = differences.min(), differences.max(), differences.mean()
    return f"{lowest:+.1f} to {highest:+.1f}, on average {mean:+.1f}"


def is_frozen_rival(method: str) -> bool:
    """Whether a method other than ours reads the same frozen models, or counts words."""
    return not (method.startswith(OURS) and method != PUBLISHED) and (
        not TUNED.search(method) and method not in ENCODERS
    )


def few_rows(lines: pd.DataFrame) -> str:
    """100 r with few rows: the mean of the draws, and the difference from the best rival."""
    rows = []
    for n_rows, some in lines[lines["draw"].notna()].groupby("train_rows"):
        cells = means(some)
        rivals = cells.loc[[name for name in cells.index if is_frozen_rival(name)]]
        single = rivals.mean(axis=1)
        ahead = cells.loc[OURS] - rivals.max()
        behind = [
            f"{TITLES[name]}, {model.split('-')[0]} {value:+.1f}"
            for (model, name), value in ahead.items()
            if value < -0.5
        ]
        best = f"{single.max():.1f} ({label(single.idxmax())})"
        means_of_cells = [average(cells.loc[OURS]), best, average(rivals.max())]
        n_draws = some.groupby(["model", "set", "method"])["draw"].nunique()
        draws = " to ".join(map(str, sorted({n_draws.min(), n_draws.max()})))
        difference = [spread(ahead), "; ".join(behind) or "none"]
        rows.append([f"{n_rows:,}", draws, *means_of_cells, *difference])
    header = ["training rows", "samples", "`RelishRegressor`", "best single rival"]
    header += ["best rival of each cell", "difference from the best rival of each cell"]
    header += ["cells more than 0.5 behind it"]
    return grid(header, rows)


def encoders(lines: pd.DataFrame) -> str:
    """Sentence encoders on the English pairs, next to ours with the first model."""
    lines = complete_rows(lines)
    lines = lines[lines["set"].isin(ENGLISH) & (lines["model"] == lines["model"].iloc[0])]
    lines = lines[lines["method"].isin([OURS, BOTH_ORDERS, *ENCODERS])]
    return seconds_of_sets(lines, ENGLISH)


def fine_tuned(lines: pd.DataFrame) -> str:
    """LoRA and RAFT next to ours, with one and both orders, by number of training rows."""
    import pandas as pd

    lines = lines[lines["draw"].isna()]
    tuned = lines[lines["method"].str.contains("LoRA|RAFT")]
    ours = lines[lines["method"].isin([OURS, BOTH_ORDERS])]
    parts = []
    for n_rows, some in tuned.groupby("train_rows"):
        same = ours[(ours["train_rows"] == n_rows) & ours["model"].isin(some["model"])]
        # The fine-tuned models are measured on the first of the test rows.
        same = same.assign(r=same["r_500"], test_rows=500)
        both = pd.concat([same[same["set"].isin(some["set"])], some])
        parts.append(f"{n_rows:,} training rows:\n\n{seconds_of_sets(both, list(TASKS))}")
    return "\n\n".join(parts)


def seconds_of_sets(lines: pd.DataFrame, sets: list[str]) -> str:
    """100 r on some sets, and the range of the seconds of reading and fitting."""
    lines = lines.assign(seconds=lines["reading_seconds"] + lines["fit_seconds"])
    cells = means(lines)
    rows = []
    for method in ordered(cells):
        own = lines.loc[lines["method"] == method, "seconds"]
        span = " to ".join(dict.fromkeys(f"{value:.0f}" for value in (own.min(), own.max())))
        rows.append([label(method), *(numbers(cells, method, name) for name in sets), span])
    return grid(["", *(TITLES[name] for name in sets), "seconds"], rows)


def source(lines: pd.DataFrame) -> str:
    """The versions of the lines, and which settings of the default they do not have."""
    packages: dict[str, set[str]] = {}
    for versions in lines["versions"]:
        for name, number in versions.items():
            if number:
                packages.setdefault(name, set()).add(number)
    names = [f"{name} {' / '.join(sorted(packages[name]))}" for name in packages]
    ours = lines.loc[lines["method"] == OURS, "settings"]
    today = settings_of_method(settings_of(RelishRegressor()))
    changed = {
        f"{name}={some[name]!r}, now {today[name]!r}"
        for some in ours.map(settings_of_method)
        for name in some
        if some[name] != today.get(name)
    }
    text = f"Versions: {', '.join(names)}."
    if changed:
        text += f" The defaults have changed since: {'; '.join(sorted(changed))}."
    return text


def settings_of_method(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that depend on the set, the seed, or the time of another method."""
    return {
        name: value for name, value in settings.items() if name.rpartition("__")[2] not in OF_CELLS
    }


TABLES: dict[str, Callable[[pd.DataFrame], str]] = {
    "short": short,
    "complete": complete,
    "summary": summary,
    "few-rows": few_rows,
    "encoders": encoders,
    "fine-tuned": fine_tuned,
    "source": source,
}


def filled(page: str, lines: pd.DataFrame) -> str:
    """A page with its tables made from the lines."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{TABLES[found[2]](lines)}\n\n{found[3]}", page)


def read_lines(path: Path) -> pd.DataFrame:
    """The lines of a file, in which a method has the same settings and version everywhere."""
    import pandas as pd

    lines = pd.DataFrame(Results(path).lines)
    settings = lines["settings"].map(lambda some: str(settings_of_method(some)))
    versions = lines["versions"].map(lambda some: str(some.get("sklearn_relish")))
    for method, of_method in (settings + versions).groupby(lines["method"]):
        if of_method.nunique() > 1:
            raise SystemExit(f"The lines of {method!r} have different settings or versions: {path}")
    return lines.assign(draw=lines.get("draw"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=Path, default=LINES)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    lines = read_lines(arguments.lines)
    for page in PAGES:
        before = page.read_text("utf-8")
        after = filled(before, lines)
        if arguments.check and after != before:
            raise SystemExit(f"{page.relative_to(ROOT)} differs: run python benchmarks/figures.py")
        page.write_text(after, "utf-8")


if __name__ == "__main__":
    main()
