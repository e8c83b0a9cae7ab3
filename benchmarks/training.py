"""Training the head on a CPU: a step and a complete fit, compared with common code.

    python benchmarks/training.py --data FOLDER --model MODEL

- A training step (batch, forward, backward, clipping, update) of 64 texts of 40 or 256 tokens,
  random states of size 576, compared with the published layout of `torch.nn.MultiheadAttention`
  with a mask. Both heads are in float32, without state norm, and have the same weights; their
  outputs are compared first. The lower bound comes from the largest matrix product and the largest
  copy that this machine can do.
- A fit of 10 epochs on STS-B, with the best epoch on the dev set, compared with the same loop with
  the textbook head, state norm included, and a `DataLoader` that shuffles and pads each batch.
  Ours averages its weights in addition. FOLDER is that of STS-B, as evaluation.py describes it.
  Without it and MODEL only steps are measured.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from evaluation import TASKS
from peers import Textbook, TextbookHead, largest_product, padded, settings, textbook_fit
from scipy.stats import pearsonr

from sklearn_relish import FrozenLLM, StateStore
from sklearn_relish.head.head import RelishHead
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.training.inference import predict_states
from sklearn_relish.training.trainer import Examples, new_head, train_head

CPU = torch.device("cpu")
SIZE, BATCH, STEPS = 576, 64, 12


def largest_copy() -> float:
    """Bytes that this machine reads and writes in a second."""
    x, y = torch.randn(2**26), torch.empty(2**26)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        y.copy_(x)
        seconds.append(time.perf_counter() - start)
    return 2 * x.nbytes / min(seconds)


def seconds_of_steps(n_tokens: int, rounds: int) -> dict[str, float]:
    """Median seconds of a step, ours and the textbook's taking turns at the same texts."""
    n_texts = BATCH * STEPS
    values = torch.randn(n_texts * n_tokens, SIZE).bfloat16()
    states = TokenStates.from_lengths(values, torch.full((n_texts,), n_tokens))
    y = torch.randn(n_texts, 1)
    head = new_head(0, input_size=SIZE, state_norm=None)
    textbook = TextbookHead(head)
    batch, mask = states.batch(torch.arange(BATCH))
    torch.testing.assert_close(head(batch, mask), textbook(batch, mask), atol=1e-5, rtol=1e-5)

    examples = Examples(states, y, torch.ones(n_texts))
    pairs = list(zip(states, y, strict=True))
    batches = [range(start, start + BATCH) for start in range(0, n_texts, BATCH)]
    times: dict[str, list[float]] = {"ours": [], "textbook": []}
    for _ in range(rounds):
        training = Textbook(head, CPU, total_steps=STEPS)
        start = time.perf_counter()
        for rows in batches:
            training.step(*padded([pairs[row] for row in rows]))
        times["textbook"].append((time.perf_counter() - start) / STEPS)
        ours = copy.deepcopy(head)
        start = time.perf_counter()
        train_head(ours, examples, None, **settings(BATCH, 1, CPU))
        times["ours"].append((time.perf_counter() - start) / STEPS)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def floor_of_step(n_tokens: int) -> tuple[float, float]:
    """Multiplications and additions, and bytes, that a step of ours can't do without."""
    d, heads, iterations = 256, 8, 3
    parameters = sum(p.numel() for p in RelishHead(SIZE).parameters())
    per_text = iterations * 10 * d * d  # MLP, and attention's query and output
    projecting = 2 * n_tokens * SIZE * d + 6 * iterations * (heads * n_tokens * d + d * d)
    folding = 6 * iterations * d * d * SIZE / BATCH + 6 * iterations * d * SIZE
    folding += 4 * iterations * heads * n_tokens * SIZE
    flops = 2 * BATCH * (3 * per_text + min(projecting, folding))
    # States once in 2 bytes; weights, gradients and AdamW's moments read, and written.
    return flops, BATCH * n_tokens * SIZE * 2 + 4 * parameters * 9


def fits(data: Path, model: str, memory: str | None, rounds: int) -> list[dict]:
    """Seconds and validation scores of whole fits on STS-B."""
    import pandas as pd

    frames = [pd.read_csv(data / f"{name}.csv", keep_default_na=False) for name in ("train", "dev")]
    llm = FrozenLLM(model)
    train, dev = (
        StateStore(memory).fetch(
            [
                TASKS["stsb"].prompt.format(**row)
                for row in frame[["text_a", "text_b"]].to_dict("records")
            ],
            llm,
            layer=llm.resolve_layer(0.55),
            max_length=512,
            progress=True,
        )
        for frame in frames
    )
    scores = [torch.tensor(frame["score"].to_numpy()).float() for frame in frames]
    mean, scale = scores[0].mean(), scores[0].std()
    y, dev_y = (((score - mean) / scale)[:, None] for score in scores)
    examples, held_out = (
        Examples(states, target, torch.ones(len(target)))
        for states, target in ((train, y), (dev, dev_y))
    )
    rows = []
    for seed in range(rounds):
        head = new_head(seed, input_size=train.hidden_size)
        ours = copy.deepcopy(head)
        start = time.perf_counter()
        train_head(ours, examples, held_out, **settings(32, 10, CPU, seed))
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        textbook = textbook_fit(head, train, y, dev, dev_y, epochs=10, device=CPU, seed=seed)
        row = {"seed": seed, "ours": seconds, "textbook": time.perf_counter() - start}
        for name, answers in (
            ("ours", torch.from_numpy(predict_states(ours, dev, CPU))),
            ("textbook", textbook.answers(dev)),
        ):
            row[f"{name}_r"] = 100 * float(pearsonr(answers[:, 0], dev_y[:, 0]).statistic)
        rows.append(row)
        print(
            f"seed {seed}: {row['ours']:.0f} s, r {row['ours_r']:.2f}; textbook"
            f" {row['textbook']:.0f} s, r {row['textbook_r']:.2f}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of STS-B's CSV files")
    parser.add_argument("--model", help="Hub id, folder or .gguf file")
    parser.add_argument("--memory", help="folder where token states are kept between runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file that JSON lines are appended to")
    arguments = parser.parse_args()

    flops, speed = largest_product(2048, torch.float32, CPU), largest_copy()
    print(f"largest product {flops / 1e9:.0f} GFLOP/s, largest copy {speed / 1e9:.0f} GB/s")
    lines: list[dict] = [{"flops": flops, "bytes": speed}]
    print(f"{'step of 64 texts':24}{'ours':>10}{'textbook':>10}{'ratio':>8}{'floor':>10}")
    for n_tokens in (40, 256):
        times = seconds_of_steps(n_tokens, arguments.rounds)
        needed = floor_of_step(n_tokens)
        floor = max(needed[0] / flops, needed[1] / speed)
        ratio = times["textbook"] / times["ours"]
        print(
            f"{f'{n_tokens} tokens of {SIZE}':24}{1e3 * times['ours']:7.1f} ms"
            f"{1e3 * times['textbook']:7.1f} ms{ratio:8.2f}{1e3 * floor:7.1f} ms",
            flush=True,
        )
        lines.append({"tokens": n_tokens, "floor": floor, **times})
    if arguments.data:
        rows = fits(arguments.data, arguments.model, arguments.memory, arguments.seeds)
        ours, textbook = (
            statistics.median(row[name] for row in rows) for name in ("ours", "textbook")
        )
        r, textbook_r = (
            statistics.mean(row[name] for row in rows) for name in ("ours_r", "textbook_r")
        )
        print(
            f"a fit on STS-B, median of {len(rows)}: {ours:.0f} s against {textbook:.0f} s, ratio"
            f" {textbook / ours:.2f}; mean r on the dev set {r:.2f} against {textbook_r:.2f}"
        )
        lines += rows
    if arguments.output:
        with arguments.output.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    main()
