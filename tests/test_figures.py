"""The tables of accuracy in the guide are those that the evaluation's lines make."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
evaluation = pytest.importorskip("evaluation", reason="the benchmarks are not installed")
figures = pytest.importorskip("figures")

SMALL, LARGE = "SmolLM2-135M", "Gemma-3-270M"
RIDGE = "ridge, mean of states"


def line(method, model, name, r, **other):
    cell = {"set": name, "model": model, "method": method, "seed": 0, "draw": None}
    cell |= {"train_rows": evaluation.TASKS[name].train_rows, "test_rows": 1000}
    found = {"r": r, "r_500": r, "rho": r, "nrmse": 20.0, "parameters": 600}
    found |= {"reading_seconds": 60.0, "fit_seconds": 30.0}
    settings = {"latent_size": 128, "prompt": name, "random_state": 0}
    return cell | found | {"versions": {"torch": "2.13"}, "settings": settings} | other


def lines_of(method, **r_of_models):
    return [
        line(method, model, name, r)
        for model, r in zip((SMALL, LARGE), r_of_models.values(), strict=True)
        for name in evaluation.TASKS
    ]


@pytest.fixture
def lines():
    """Ours is ahead with the first model and behind with the second."""
    ours = lines_of(evaluation.OURS, small=61.0, large=70.0)
    published = lines_of(evaluation.PUBLISHED, small=50.0, large=52.0)
    return pd.DataFrame([*lines_of(RIDGE, small=60.0, large=72.0), *ours, *published])


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.name)
def test_a_page_has_the_figures_of_the_lines(page):
    page, lines = page.read_text("utf-8"), figures.read_lines(figures.LINES)
    assert figures.filled(page, lines) == page
    assert figures.filled(page, lines.assign(r=lines["r"] + 1)) != page


def test_short_table(lines):
    table = figures.short(lines).splitlines()
    assert table[0] == "|  | STS-B | SICK-R | WMT en-zh | WMT ru-en | WMT si-en | mean |"
    assert table[2] == f"| {RIDGE} |" + " 60.0 / **72.0** |" * 5 + " 66.0 |"
    assert table[3] == "| `RelishRegressor` |" + " **61.0** / 70.0 |" * 5 + " 65.5 |"


def test_a_mean_needs_all_cells(lines):
    rows = figures.short(lines.drop(index=lines.index[0])).splitlines()[2:]
    assert rows[0].startswith("| `RelishRegressor` |")
    assert rows[-1] == f"| {RIDGE} | - / **72.0** |" + " 60.0 / **72.0** |" * 4 + " - |"


def test_rows_of_draws_are_only_in_the_table_of_few_rows(lines):
    drawn = lines.assign(draw=0, train_rows=100)
    drawn.loc[drawn["method"] == evaluation.OURS, "r"] += 1.0
    both = pd.concat([lines, drawn, drawn.assign(draw=1, r=drawn["r"] + 2)])
    assert figures.short(both) == figures.short(lines)
    *_, row = figures.few_rows(both).splitlines()
    behind = "; ".join(f"{title}, Gemma -1.0" for title in figures.TITLES.values())
    ahead = "-1.0 to +2.0, on average +0.5"
    assert row == f"| 100 | 2 | 67.5 | 67.0 ({RIDGE}) | 67.0 | {ahead} | {behind} |"


def test_summary(lines):
    text = figures.summary(lines)
    assert "-2.0 to +1.0, on average -0.5; ahead in 5 of 10 cells." in text
    assert "of the published configuration, in 10 cells: +11.0 to +18.0, on average +14.5." in text
    assert "1.00 on average; STS-B 1.00" in text
    assert "both orders" not in text
    both = lines_of(evaluation.BOTH_ORDERS, small=62.0, large=74.0)
    text = figures.summary(pd.concat([lines, pd.DataFrame(both)]))
    assert "-2.0 to +1.0, on average -0.5; ahead in 5 of 10 cells." in text
    assert "100 r with both orders of a pair minus 100 r with one, in 10 cells: +1.0 to" in text


def test_the_default_is_shown_on_the_test_rows_of_fine_tuned_models(lines):
    tuned = line("LoRA", SMALL, "stsb", 80.0, test_rows=500)
    ours = (lines["method"] == evaluation.OURS) & (lines["set"] == "stsb")
    lines.loc[ours, "r_500"] = 85.0
    *_, first, second = figures.fine_tuned(pd.concat([lines, pd.DataFrame([tuned])])).splitlines()
    assert first == "| `RelishRegressor` | **85.0** | - | - | - | - | 90 |"
    assert second == "| LoRA | 80.0 | - | - | - | - | 90 |"


def test_source_names_versions_and_changed_defaults(lines):
    assert figures.source(lines).startswith("Versions: torch 2.13.")
    assert "latent_size" not in figures.source(lines)
    old = lines.assign(settings=[{"latent_size": 99}] * len(lines))
    assert figures.source(old).endswith("The defaults have changed since: latent_size=99, now 128.")


def test_lines_of_other_settings_are_not_mixed(tmp_path, lines):
    path = tmp_path / "lines.jsonl"
    records = lines.to_dict("records")
    records[0] |= {"settings": {"latent_size": 64}}
    path.write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(SystemExit, match=f"'{RIDGE}' have different settings"):
        figures.read_lines(path)
