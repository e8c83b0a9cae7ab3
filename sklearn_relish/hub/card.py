"""The model card of a saved regressor."""

from __future__ import annotations

import os
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from sklearn_relish.base import BaseLLMEstimator

CARD_TEXT = """---
{{ card_data }}
---

# {{ title }}

Texts in, {{ numbers }} out: {{ heads }} of the package `sklearn-relish` on the token states of
layer {{ layer }} of the frozen language model `{{ model }}`{{ revision }}.

```python
from sklearn_relish import RelishRegressor

regressor = RelishRegressor.from_pretrained("this folder, or its Hub id")
regressor.predict(["a text"])
```
{% if metrics %}
| metric | value |
| --- | --- |
{% for name, value in metrics.items() -%}
| {{ name }} | {{ "%.4g" | format(value) }} |
{% endfor -%}
{% endif %}
Parameters: `{{ parameters }}`
"""


def model_card(
    cls: type[BaseLLMEstimator],
    state: dict[str, Any],
    parameters: dict[str, Any],
    metrics: dict[str, float] | None,
) -> ModelCard:
    """The card of a fitted regressor, given its state and the saved parameters."""
    model, name = state["model"], "RelishRegressor"
    figures = {}
    if state["validation_score_"] is not None:
        figures["R² on held-out rows of the fit"] = state["validation_score_"]
    figures |= metrics or {}
    changed = cls().get_params()
    changed = {
        key: value
        for key, value in parameters.items()
        if key not in ("model", "model_kwargs") and repr(value) != repr(changed[key])
    }
    data = ModelCardData(
        library_name="sklearn-relish",
        tags=["regression", "text", "scikit-learn"],
        base_model=None if os.path.exists(model) else model,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-regression",
                dataset_type="own",
                dataset_name="own data",
                metric_type=figure,
                metric_value=float(value),
            )
            for figure, value in figures.items()
        ]
        or None,
    )
    n_heads, n_outputs = len(state["head_"].heads), state["n_outputs_"]
    return ModelCard.from_template(
        data,
        template_str=CARD_TEXT,
        title=name,
        numbers="a number" if n_outputs == 1 else f"{n_outputs} numbers",
        heads="a RELISH head" if n_heads == 1 else f"{n_heads} RELISH heads",
        layer=state["layer_"],
        model=os.path.basename(model) if os.path.exists(model) else model,
        revision=f" at commit `{state['_llm_revision']}`" if state["_llm_revision"] else "",
        metrics=figures,
        parameters=", ".join(f"{key}={value!r}" for key, value in changed.items()) or "defaults",
    )
