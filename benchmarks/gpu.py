"""Everything that concerns a GPU, in one command of some minutes, without network or real weights.

    python benchmarks/gpu.py

- Checks: reading and training are compared with float32 on the CPU, and a pass is run that is
  larger than the memory that torch may use. At the end nothing may be left on the GPU.
- Reading: a decoder of the shape of Qwen3-8B (36 layers of size 4096; fewer with `--layers`) with
  random weights in bfloat16 reads texts of 20 to 200 tokens, all layers, with several token
  budgets, with and without batches of similar length. The FLOPs of the model per second, for real
  tokens, are compared with those of a large product in bfloat16.
- Training: 10 epochs of 6,000 texts of 40 tokens of size 4096. This package in float32 is compared
  with the textbook loop (peers.py) in float32 and in bfloat16, both with a `DataLoader` that
  collates on the CPU.

Prints tables and JSON lines, and exits with 1 if a check fails.
"""

import argparse
import copy
import gc
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from peers import TextbookHead, largest_product, settings, textbook_fit
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

import sklearn_relish.llm.batching
from sklearn_relish import FrozenLLM, RelishRegressor
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.training.inference import predict_states
from sklearn_relish.training.trainer import Examples, new_head, train_head

GPU, CPU = torch.device("cuda"), torch.device("cpu")
VOCABULARY = 1_000  # words of the made-up texts; the embeddings take no part in the FLOPs
QWEN3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each of the words w2 to w999."""
    vocabulary = {"<pad>": 0, "</s>": 1} | {f"w{number}": number for number in range(2, VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


def made_up_texts(n_texts: int, shortest: int, longest: int) -> list[str]:
    random = np.random.default_rng(0)
    lengths = random.integers(shortest, longest + 1, n_texts)
    return [" ".join(f"w{n}" for n in random.integers(2, VOCABULARY, k)) for k in lengths]


def configuration(sizes: dict[str, int]) -> Qwen3Config:
    return Qwen3Config(vocab_size=VOCABULARY, max_position_embeddings=512, **sizes)


def save_model(folder: str, sizes: dict[str, int]) -> None:
    torch.manual_seed(0)
    Qwen3Model(configuration(sizes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def random_llm(folder: str, sizes: dict[str, int]) -> FrozenLLM:
    """A model whose weights are made on the GPU in bfloat16, not loaded."""
    configuration(sizes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    llm = FrozenLLM(folder, device=GPU, dtype="bfloat16")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with GPU:
            network = Qwen3Model(configuration(sizes))
    finally:
        torch.set_default_dtype(before)
    network.config.use_cache = False
    loaded = network.eval().requires_grad_(False), llm.n_layers
    llm._load_network = lambda layers: loaded
    return llm


def read_all(llm: FrozenLLM, texts: list[str], layer: int) -> list[torch.Tensor]:
    """States of each text, in order."""
    states: list[torch.Tensor] = [torch.empty(0)] * len(texts)
    for rows, (batch,), _ in llm.read(texts, layers=[layer], max_length=512):
        for row, text in zip(rows, batch, strict=True):
            states[row] = text
    return states


def seconds(function: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def task(n_texts: int, n_tokens: int, size: int, *, ragged: bool, seed: int) -> Examples:
    """Random states, whose number is the first component of the token with the largest second."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.full((n_texts,), n_tokens)
    if ragged:
        lengths = torch.randint(1, 2 * n_tokens, (n_texts,), generator=generator)
    values = torch.randn(int(lengths.sum()), size, generator=generator).bfloat16()
    y = [float(text[text[:, 1].argmax(), 0]) for text in values.split(lengths.tolist())]
    states = TokenStates.from_lengths(values, lengths)
    return Examples(states, torch.tensor(y)[:, None], torch.ones(n_texts))


def apart(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square of the difference, in those of the reference."""
    difference = ours.double().cpu() - reference.double().cpu()
    return float(difference.square().mean().sqrt() / reference.double().square().mean().sqrt())


class Checks:
    """What was checked, and whether all held."""

    def __init__(self) -> None:
        self.failed = False

    def __call__(self, what: str, value: float, bound: float) -> None:
        holds = value <= bound
        self.failed |= not holds
        print(
            f"{'ok    ' if holds else 'FAILED'} {what}: {value:.2g} (at most {bound:g})", flush=True
        )


def check_reading(check: Checks) -> None:
    texts = made_up_texts(300, 1, 60)
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, SMALL)
        reference = torch.cat(read_all(FrozenLLM(folder, device="cpu", dtype="float32"), texts, 2))
        llms = {
            dtype: FrozenLLM(folder, device="cuda", dtype=dtype)
            for dtype in ("float32", "bfloat16")
        }
        for (dtype, llm), bound in zip(llms.items(), (1e-3, 3e-2), strict=True):
            states = torch.cat(read_all(llm, texts, 2))
            check(f"states in {dtype} against float32 on the CPU", apart(states, reference), bound)
        # 256 MiB more than are taken are too little for a pass of 4 million tokens.
        many = texts * 300
        total = torch.cuda.get_device_properties(GPU).total_memory
        kept = torch.cuda.memory_reserved()
        torch.cuda.set_per_process_memory_fraction((kept + 2**28) / total)
        llms["float32"].token_budget = sklearn_relish.llm.batching.CHUNK_TEXTS = 2**22
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            states = torch.cat(read_all(llms["float32"], many, 2)[: len(texts)])
        torch.cuda.set_per_process_memory_fraction(1.0)
        sklearn_relish.llm.batching.CHUNK_TEXTS = 4_096
        check("states after batches that were too large", apart(states, reference), 1e-3)
        check("of warnings, those missing", float(not caught), 0)

        y = np.arange(300.0) % 17
        fitted = {}
        for device in ("cuda", "cpu"):
            regressor = RelishRegressor(
                folder, device=device, dtype="float32", random_state=0, max_epochs=3
            )
            fitted[device] = torch.from_numpy(regressor.fit(texts, y).predict(texts))
        check("an estimator's predictions, CUDA against CPU", apart(*fitted.values()), 0.03)


def check_training(check: Checks) -> None:
    examples = task(1500, 6, 64, ragged=True, seed=0)
    fresh = task(1500, 6, 64, ragged=True, seed=1)
    losses = {}
    for name, device in (("CPU", CPU), ("GPU", GPU)):
        head = new_head(0, input_size=64, latent_size=64, state_norm="rms")
        course = train_head(
            head, examples, fresh, deep_supervision=True, **settings(32, 20, device)
        )
        losses[name] = course.history[-1]["validation_loss"]
    check("validation loss, GPU against CPU", abs(losses["GPU"] / losses["CPU"] - 1), 0.03)
    predictions = torch.from_numpy(predict_states(head, fresh.states, GPU))
    reference = torch.from_numpy(predict_states(head, fresh.states, CPU))
    check("predictions on the GPU against float64 on the CPU", apart(predictions, reference), 1e-3)

    head = new_head(0, input_size=4096)
    states, mask = task(64, 40, 4096, ragged=True, seed=0).states.batch(torch.arange(64))
    states, mask = states.to(GPU), mask.to(GPU)
    textbook = TextbookHead(head).to(GPU)
    head.to(GPU)
    with torch.inference_mode():
        check(
            "head against the textbook's", apart(head(states, mask), textbook(states, mask)), 1e-3
        )


def reading(llm: FrozenLLM, n_texts: int, rounds: int) -> None:
    n_layers = llm.n_layers
    ceiling = largest_product(8192, torch.bfloat16, GPU)
    texts = made_up_texts(n_texts, 20, 200)
    lengths = np.array([len(text.split()) for text in texts], dtype=float)
    own = [len(ids) for ids in llm.tokenizer(texts)["input_ids"]]
    assert own == lengths.tolist(), "a word is to be a token"
    n_tokens = sum(own)
    weights = sum(p.numel() for layer in llm._forward_pass.layers for p in layer.parameters())
    attention = 2 * n_layers * 4096 * float((lengths**2).sum())  # causal: half of 4 S² D
    flops = 2 * weights * n_tokens + attention
    print(f"largest product {ceiling / 1e12:.0f} TFLOP/s; {n_texts} texts, {n_tokens} tokens")
    for budget, enough in ((4_096, 4_096), (8_192, 4_096), (16_384, 4_096), (16_384, 16_384)):
        llm.token_budget = budget
        sklearn_relish.llm.batching.ANY_LENGTH_TOKENS["cuda"] = enough
        list(llm.read(texts[:200], layers=[n_layers], max_length=512))
        took = statistics.median(
            seconds(lambda: list(llm.read(texts, layers=[n_layers], max_length=512)))
            for _ in range(rounds)
        )
        share = flops / took / ceiling
        line = {
            "device": torch.cuda.get_device_name(),
            "budget": llm.token_budget,
            "of_any_length_up_to": enough,
            "tokens_per_second": n_tokens / took,
            "share": share,
        }
        print(
            f"budget of {llm.token_budget:6} tokens, any length up to {enough:6}:"
            f" {n_texts / took:7.0f} texts/s {n_tokens / took:9.0f} tokens/s"
            f" {100 * share:5.1f} % of the product\n{json.dumps(line)}",
            flush=True,
        )


def training(rounds: int) -> None:
    examples = task(6000, 40, 4096, ragged=False, seed=0)
    held_out = task(600, 40, 4096, ragged=False, seed=1)
    head = new_head(0, input_size=4096)

    def ours() -> None:
        train_head(copy.deepcopy(head), examples, held_out, **settings(32, 10, GPU))

    def textbook() -> None:
        data = examples.states, examples.y, held_out.states, held_out.y
        textbook_fit(head, *data, epochs=10, device=GPU, seed=0)

    def textbook_in_bfloat16() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            textbook()

    contenders = {"ours": ours, "textbook": textbook, "in bfloat16": textbook_in_bfloat16}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, fit in contenders.items():
            times[name].append(seconds(fit))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"head fit, 6,000 texts of 40 x 4096, 10 epochs: {medians['ours']:.1f} s, textbook"
        f" {medians['textbook']:.1f} s, ratio {medians['textbook'] / medians['ours']:.1f}; in"
        f" bfloat16 {medians['in bfloat16']:.1f} s"
    )
    print(json.dumps({"device": torch.cuda.get_device_name(), **medians}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--texts", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no CUDA device here.")

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    check = Checks()
    check_reading(check)
    check_training(check)
    gc.collect()
    before = torch.cuda.memory_allocated()
    training(arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        sizes = QWEN3_8B | {"num_hidden_layers": arguments.layers}
        reading(random_llm(folder, sizes), arguments.texts, arguments.rounds)
    gc.collect()
    left = torch.cuda.memory_allocated() - before
    check("MiB left on the GPU by training and reading", left / 2**20, 100)
    sys.exit(check.failed)


if __name__ == "__main__":
    main()
