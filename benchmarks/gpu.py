"""All that concerns a GPU, in one command of some minutes: no network, no weights but random ones.

    python benchmarks/gpu.py

Reading: a decoder of Qwen3-8B's shape (36 layers of size 4096; `--layers` for fewer), random
weights in bfloat16, texts of 20 to 200 tokens, all layers: model FLOPs of real tokens a second
beside what a large product in bfloat16 reaches, at several token budgets. Training: 10 epochs of
6,000 texts of 40 tokens of size 4096 beside the textbook loop (peers.py). Before that, checks: the
same reading and training against float32 on the CPU, states that do not fit beside those that do,
a budget that is too large for the memory, and that nothing stays on the GPU.

Prints tables, then a JSON line each. Exits with 1 where a check fails.
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
from peers import TextbookHead, textbook_fit
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

import sklearn_relish.batches
from sklearn_relish import FrozenLLM, RelishRegressor
from sklearn_relish.states import TokenStates
from sklearn_relish.training import Examples, head_answers, new_head, train_head

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
    """A token for each of the words "0" to "999"."""
    vocabulary = {str(number): number for number in range(VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")


def made_up_texts(n_texts: int, shortest: int, longest: int) -> list[str]:
    random = np.random.default_rng(0)
    lengths = random.integers(shortest, longest + 1, n_texts)
    return [" ".join(map(str, random.integers(2, VOCABULARY, length))) for length in lengths]


def save_model(folder: str, sizes: dict[str, int]) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=VOCABULARY, max_position_embeddings=512, **sizes)
    Qwen3Model(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


class RandomLLM(FrozenLLM):
    """A model whose weights are made on the GPU, not loaded."""

    def __init__(self, sizes: dict[str, int]) -> None:
        folder = tempfile.mkdtemp()
        config = Qwen3Config(vocab_size=VOCABULARY, max_position_embeddings=512, **sizes)
        config.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        super().__init__(folder, device=GPU, dtype="bfloat16")
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with GPU:
                network = Qwen3Model(config)
        finally:
            torch.set_default_dtype(before)
        network.config.use_cache = False
        self.network = network.eval().requires_grad_(False)


def read_all(llm: FrozenLLM, texts: list[str], layer: int) -> list[torch.Tensor]:
    """States of each text, in order."""
    states: list[torch.Tensor] = [torch.empty(0)] * len(texts)
    for rows, batch, _ in llm.read(texts, layer=layer, max_length=512):
        for row, text in zip(rows, batch, strict=True):
            states[row] = text
    return states


def seconds(function: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def settings(device: torch.device, epochs: int) -> dict:
    return {
        "loss": "huber",
        "learning_rate": 5e-4,
        "weight_decay": 0.01,
        "batch_size": 32,
        "max_epochs": epochs,
        "n_iter_no_change": None,
        "seed": 0,
        "device": device,
        "progress": False,
    }


def task(n_texts: int, n_tokens: int, size: int, ragged: bool) -> Examples:
    """Random states, whose number is the first component of the token with the largest second."""
    generator = torch.Generator().manual_seed(0)
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
        llm, passes, network = llms["float32"], [], llms["float32"]._states_at

        def tight(layer: int, **inputs: torch.Tensor) -> torch.Tensor:
            passes.append(inputs["input_ids"].numel())
            if passes[-1] > 500:
                raise torch.OutOfMemoryError("as if")
            return network(layer, **inputs)

        llm._states_at = tight
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            states = torch.cat(read_all(llm, texts, 2))
        check("states after batches that were too large", apart(states, reference), 1e-3)
        check("of warnings, those missing", float(not caught), 0)

        y = np.arange(300.0) % 17
        fitted = {}
        for device in ("cuda", "cpu"):
            regressor = RelishRegressor(
                folder, device=device, dtype="float32", random_state=0, max_epochs=3
            )
            fitted[device] = torch.from_numpy(regressor.fit(texts, y).predict(texts))
        check("an estimator's predictions, CUDA against CPU", apart(*fitted.values()), 0.2)


def check_training(check: Checks) -> None:
    examples = task(1500, 6, 64, ragged=True)
    fresh = task(1500, 6, 64, ragged=True)
    found = {}
    for name, device, share in (
        ("CPU", CPU, 1.0),
        ("states on the GPU", GPU, 1.0),
        ("states sent batch by batch", GPU, 0.0),
    ):
        sklearn_relish.batches.RESIDENT_SHARE = share
        head = new_head(0, input_size=64, latent_size=64, state_norm="rms")
        history = train_head(head, examples, fresh, **settings(device, 20)).history
        found[name] = history[-1]["validation_loss"]
        if device == GPU:
            difference = abs(found[name] / found["CPU"] - 1)
            check(f"validation loss, {name}, against the CPU's", difference, 0.1)
            answers = torch.from_numpy(head_answers(head, fresh.states, GPU))
            reference = torch.from_numpy(head_answers(head, fresh.states, CPU))
            check(f"answers, {name}, against float64", apart(answers, reference), 1e-3)
    sklearn_relish.batches.RESIDENT_SHARE = 0.5

    big = task(64, 40, 4096, ragged=True)
    head = new_head(0, input_size=4096).to(GPU)
    states, mask = (tensor.to(GPU) for tensor in big.states.batch(torch.arange(64)))
    textbook = TextbookHead(head.cpu()).to(GPU)
    with torch.inference_mode():
        outputs = head.to(GPU)(states.float(), mask), textbook(states, mask)
    check("head against the textbook's, float32", apart(*outputs), 1e-3)


def largest_product() -> float:
    """Multiplications and additions a second of a large product in bfloat16."""
    a, b = (torch.randn(8192, 8192, device=GPU, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / min(seconds(lambda: a @ b) for _ in range(20))


def reading(n_layers: int, n_texts: int, rounds: int) -> list[dict]:
    ceiling = largest_product()
    llm = RandomLLM(QWEN3_8B | {"num_hidden_layers": n_layers})
    texts = made_up_texts(n_texts, 20, 200)
    n_tokens = sum(len(text.split()) for text in texts)
    weights = sum(p.numel() for layer in llm._layers for p in layer.parameters())
    lengths = np.array([len(text.split()) for text in texts], dtype=float)
    attention = 2 * n_layers * 4096 * float((lengths**2).sum())  # causal: half of 4 S² D
    flops = 2 * weights * n_tokens + attention
    print(f"largest product {ceiling / 1e12:.0f} TFLOP/s; {n_texts} texts, {n_tokens} tokens")
    rows = []
    for budget in (4_096, 8_192, 16_384, 32_768):
        llm.token_budget = budget
        list(llm.read(texts[:200], layer=n_layers, max_length=512))
        took = statistics.median(
            seconds(lambda: list(llm.read(texts, layer=n_layers, max_length=512)))
            for _ in range(rounds)
        )
        share = flops / took / ceiling
        print(
            f"budget of {llm.token_budget:6} tokens: {n_texts / took:7.0f} texts/s"
            f" {n_tokens / took:9.0f} tokens/s {100 * share:5.1f} % of the product",
            flush=True,
        )
        rows.append({"budget": budget, "tokens_per_second": n_tokens / took, "share": share})
    return [{"ceiling": ceiling, "reading": rows}]


def training(rounds: int) -> list[dict]:
    examples, held_out = task(6000, 40, 4096, ragged=False), task(600, 40, 4096, ragged=False)
    head = new_head(0, input_size=4096)

    def ours() -> None:
        train_head(copy.deepcopy(head), examples, held_out, **settings(GPU, 10))

    def textbook() -> None:
        textbook_fit(
            head,
            examples.states,
            examples.y,
            held_out.states,
            held_out.y,
            epochs=10,
            device=GPU,
            seed=0,
        )

    times: dict[str, list[float]] = {"ours": [], "textbook": []}
    for _ in range(rounds):
        times["ours"].append(seconds(ours))
        times["textbook"].append(seconds(textbook))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["textbook"] / medians["ours"]
    print(
        f"head fit, 6,000 texts of 40 x 4096, 10 epochs: {medians['ours']:.1f} s, textbook"
        f" {medians['textbook']:.1f} s, ratio {ratio:.1f}"
    )
    return [{"fit": medians, "ratio": ratio}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--texts", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no CUDA device here.")

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    check = Checks()
    check_reading(check)
    check_training(check)
    lines = training(arguments.rounds)
    lines += reading(arguments.layers, arguments.texts, arguments.rounds)
    gc.collect()
    torch.cuda.empty_cache()
    left = torch.cuda.memory_allocated() / 2**20
    check("MiB left on the GPU", left, 100)
    for line in lines:
        print(json.dumps({"device": torch.cuda.get_device_name(), **line}))
    sys.exit(check.failed)


if __name__ == "__main__":
    main()
