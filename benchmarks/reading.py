"""Reading texts on a CPU, compared with Sentence Transformers and with padding to 256 tokens.

    pip install -e ".[benchmarks]" && python benchmarks/reading.py --data FOLDER --model MODEL

MODEL is a folder or a .gguf file; evaluation.py says what the folder of STS-B has. Measures texts
per second of STS-B for token states at layer 20 from

- this package,
- Sentence Transformers' ``encode(output_value="token_embeddings")`` with its defaults: the same
  model in the same dtype, all layers,
- an encoder that pads each text to 256 tokens and keeps all hidden states, as the official code
  of RELISH does; it reads an eighth of the texts, 8 at a time, and its time is scaled.

They run in turns on the same tokens, and the median is reported. (Sentence Transformers would
apply the tokenizer's chat template, so it gets a folder without one.) Then one text at a time:
``predict`` of a fitted regressor, after a warm-up, compared with the tokenizer and the forward pass
of the language model on that text, for layers 1 to 20 and for all layers.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from evaluation import TASKS
from peers import largest_product
from transformers import AutoModel

from sklearn_relish import FrozenLLM, RelishRegressor

LAYER, PADDED, PADDED_FRACTION = 20, 256, 8


def without_chat_template(source: str, folder: str) -> str:
    """The same model in a folder that has no chat template."""
    for path in Path(source).iterdir():
        if path.name != "chat_template.jinja":
            Path(folder, path.name).symlink_to(path)
    return folder


def padded_encoder(llm: FrozenLLM) -> Callable[[list[str]], None]:
    """An encoder that pads texts to 256 tokens and keeps the hidden states of all layers."""
    network = AutoModel.from_pretrained(llm._source, dtype=llm.torch_dtype).eval()
    tokenizer = llm.tokenizer
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def encode(texts: list[str]) -> None:
        for start in range(0, len(texts), 8):
            ids = torch.full((len(texts[start : start + 8]), PADDED), padding)
            mask = torch.zeros_like(ids)
            for row, text in enumerate(texts[start : start + 8]):
                own = tokenizer(text)["input_ids"][:PADDED]
                ids[row, : len(own)] = torch.tensor(own)
                mask[row, : len(own)] = 1
            with torch.inference_mode():
                network(input_ids=ids, attention_mask=mask, output_hidden_states=True)

    return encode


def one_by_one(llm: FrozenLLM, texts: list[str]) -> dict[str, float]:
    """Median milliseconds of `predict` and of forward passes, for texts not seen before."""
    regressor = RelishRegressor(llm, layer=LAYER, max_epochs=1, random_state=0)
    regressor.fit(texts[:64], range(64))

    def forward(layer: int) -> Callable[[list[str]], object]:
        def run(texts: list[str]) -> None:
            ids = torch.tensor(llm.tokenizer(texts)["input_ids"])
            with torch.inference_mode():
                llm._forward_pass.states_at([layer], input_ids=ids)

        return run

    passes = {
        "predict": regressor.predict,
        f"layers 1 to {LAYER}": forward(LAYER),
        "all layers": forward(llm.n_layers),
    }
    times: dict[str, list[float]] = {name: [] for name in passes}
    for text in texts[64:]:
        for name, run in passes.items():
            times[name].append(1e3 * seconds(run, [text]))
    return {name: statistics.median(values) for name, values in times.items()}


def seconds(function: Callable[[list[str]], object], texts: list[str]) -> float:
    start = time.perf_counter()
    function(texts)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of STS-B's CSV files")
    parser.add_argument("--model", required=True, help="folder or .gguf file")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="file that a JSON line is appended to")
    arguments = parser.parse_args()

    import pandas as pd

    rows = pd.read_csv(arguments.data / "train.csv", keep_default_na=False)[: arguments.rows]
    texts = [
        TASKS["stsb"].prompt.format(**row) for row in rows[["text_a", "text_b"]].to_dict("records")
    ]
    llm = FrozenLLM(arguments.model, device="cpu")
    own = [len(ids) for ids in llm.tokenizer(texts)["input_ids"]]
    from sentence_transformers import SentenceTransformer

    with tempfile.TemporaryDirectory() as folder:
        theirs = SentenceTransformer(
            without_chat_template(llm._source, folder),
            device="cpu",
            model_kwargs={"dtype": llm.torch_dtype},
        )
    theirs_tokens = theirs.preprocess(texts)["attention_mask"].sum(1).tolist()
    assert theirs_tokens == own, "the tokens of Sentence Transformers differ"
    assert theirs.dtype == llm.torch_dtype
    assert max(own) <= PADDED, "a text is longer than the padded length"
    padded = padded_encoder(llm)

    contenders = {
        "this package, 20 layers": lambda texts: list(
            llm.read(texts, layers=[LAYER], max_length=512)
        ),
        "Sentence Transformers, all layers": lambda texts: theirs.encode(
            texts, output_value="token_embeddings", show_progress_bar=False
        ),
        f"padded to {PADDED}, all hidden states": lambda texts: padded(
            texts[: len(texts) // PADDED_FRACTION]
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for read in contenders.values():
        read(texts[:64])
    for _ in range(arguments.rounds):
        for name, read in contenders.items():
            factor = PADDED_FRACTION if name.startswith("padded") else 1
            times[name].append(factor * seconds(read, texts))

    product = largest_product(2048, llm.torch_dtype, llm.torch_device)
    weights = sum(
        p.numel() for layer in llm._forward_pass.layers[:LAYER] for p in layer.parameters()
    )
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = medians["this package, 20 layers"]
    utilization = 2 * weights * sum(own) / ours / product
    print(f"{len(texts)} texts, {sum(own)} tokens, {llm.torch_dtype}")
    for name, median in medians.items():
        speed = f"{len(texts) / median:8.1f} texts/s"
        print(f"{name:40}{speed}   this package is {median / ours:.2f} times as fast")
    print(
        f"largest matrix product: {product / 1e9:.0f} GFLOP/s; products of weights and real tokens"
        f" reach {100 * utilization:.0f} % of that"
    )
    alone = one_by_one(llm, texts[:264])
    for name, milliseconds in alone.items():
        ratio = alone["predict"] / milliseconds
        print(
            f"one text, {name:24}{milliseconds:6.1f} ms   predict takes {ratio:.2f} times as long"
        )
    if arguments.output:
        line = {"rows": len(texts), **medians, "utilization": utilization, **alone}
        with arguments.output.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
