"""The model card of a saved regressor."""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from sklearn_relish.base import BaseLLMEstimator
from sklearn_relish.hub.model_name import base_name, is_local
from sklearn_relish.utils.versions import stamp

CARD_TEXT = """---
{{ card_data }}
---

# {{ title }}

{{ inputs }} in, {{ numbers }} out: {{ heads }} of the package `sklearn-relish` on the token states
of layer {{ layer }} of the frozen language model `{{ model }}`{{ revision }}.

```python
from sklearn_relish import RelishRegressor

regressor = RelishRegressor.from_pretrained({{ source }})
regressor.predict({{ example }})
```
{% if is_local %}
The language model was a local one: pass its place on your machine,
`from_pretrained(..., model=...)`.
{% endif -%}
{% if figures %}
| metric | value |
| --- | --- |
{% for name, value in figures.items() -%}
| {{ name }} | {{ "%.4g" | format(value) }} |
{% endfor -%}
{% endif %}
Parameters: `{{ parameters }}`

Versions: {{ versions }}
"""
# A cell of each kind of column, for the example of the card.
CELLS = {"integer": 1, "number": 1.5, "boolean": True, "date": "2024-12-31", "time": "12:00:00"}


def model_card(
    cls: type[BaseLLMEstimator],
    state: dict[str, Any],
    parameters: dict[str, Any],
    metrics: dict[str, float] | None,
    license: str | None,
    repo_id: str | None,
) -> ModelCard:
    """The card of a fitted regressor, given its state and the saved parameters."""
    model, name = state["model"], "RelishRegressor"
    columns = state["_column_names"] if state.get("feature_names_in_") is not None else None
    task = "text-classification" if columns is None else "tabular-regression"
    results = []
    if state["validation_score_"] is not None:
        figure, score = "R² of out-of-fold predictions", state["validation_score_"]
        results.append(result(task, "training data", "r_squared", figure, score))
    results += [
        result(task, "own data", figure, figure, value) for figure, value in (metrics or {}).items()
    ]
    defaults = cls().get_params()
    changed = {
        key: value
        for key, value in parameters.items()
        if key not in ("model", "model_kwargs") and repr(value) != repr(defaults[key])
    }
    data = ModelCardData(
        library_name="sklearn-relish",
        pipeline_tag=task,  # a text with a score is a subtask of the Hub's text-classification
        license=license,
        tags=["regression", "text", "scikit-learn"],
        base_model=None if is_local(model) else model,
        model_name=name,
        eval_results=results or None,
    )
    n_heads, n_outputs = len(state["head_"].heads), state["n_outputs_"]
    return ModelCard.from_template(
        data,
        template_str=CARD_TEXT,
        title=name,
        inputs="Texts" if columns is None else f"Rows of the columns {', '.join(columns)}",
        numbers="a number" if n_outputs == 1 else f"{n_outputs} numbers",
        heads="a RELISH head" if n_heads == 1 else f"{n_heads} RELISH heads",
        layer=state["layer_"],
        model=base_name(model) if is_local(model) else model,
        is_local=is_local(model),
        revision=f" at commit `{state['_llm_revision']}`" if state["_llm_revision"] else "",
        source=repr(repo_id or "this folder, or its Hub id"),
        example=example(columns, state),
        figures={each.metric_name: each.metric_value for each in results},
        parameters=", ".join(f"{key}={value!r}" for key, value in changed.items()) or "defaults",
        versions=", ".join(f"{name} {number}" for name, number in stamp()["versions"].items()),
    )


def result(task: str, dataset: str, metric_type: str, figure: str, value: float) -> EvalResult:
    """A figure in the format of the Hub."""
    return EvalResult(
        task_type=task,
        dataset_type=dataset.replace(" ", "-"),
        dataset_name=dataset,
        metric_type=metric_type,
        metric_name=figure,
        metric_value=float(value),
    )


def example(columns: list[str] | None, state: dict[str, Any]) -> str:
    """Python code of an `X` with one row that `predict` accepts."""
    kinds = [kind.removesuffix(" or missing") for kind in state["_column_kinds"]]
    cells = [CELLS.get(kind, "a text") for kind in kinds]
    if columns is not None:
        return repr({name: [cell] for name, cell in zip(columns, cells, strict=True)})
    return repr(cells if len(cells) == 1 else [cells])
