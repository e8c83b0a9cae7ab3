"""Check that the states of a text are bit-equal in any batch, for texts of 1 to 600 tokens.

Each text is read with all other texts, in another order, alone, and alone with one thread.
`ONEDNN_MAX_CPU_ISA` simulates older CPUs. Prints a table and a JSON line.

    python benchmarks/batch_invariance.py --model M [--dtype float32] [--step 8]
"""

import argparse
import json
import os

import numpy as np
import torch

from sklearn_relish import FrozenLLM


def lengths(step: int) -> list[int]:
    """All lengths up to 64 in small steps, then up to 600 in large ones."""
    return [*range(1, 65, max(1, step // 8)), *range(65, 601, step)]


def read(llm: FrozenLLM, texts: list[np.ndarray], layer: int) -> list[torch.Tensor]:
    """States of tokenized texts."""
    states = [None] * len(texts)
    for rows, (batch,) in llm._read_tokens(texts, [layer]):
        for row, text in zip(rows, batch, strict=True):
            states[row] = text.clone()
    return states


def differing(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[int]:
    """Lengths of the texts whose states are not bit-equal."""
    pairs = zip(found, expected, strict=True)
    return [len(a) for a, b in pairs if not torch.equal(a, b)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder, .gguf file or Hub id")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--layer", type=float, default=0.6)
    parser.add_argument("--step", type=int, default=8, help="between lengths above 64")
    arguments = parser.parse_args()
    llm = FrozenLLM(arguments.model, device="cpu", dtype=arguments.dtype)
    layer = llm.resolve_layer(arguments.layer)
    rng = np.random.default_rng(0)
    vocabulary = llm.network.config.vocab_size
    texts = [rng.integers(5, vocabulary, size=n) for n in lengths(arguments.step)]
    threads = torch.get_num_threads()
    together = read(llm, texts, layer)
    order = rng.permutation(len(texts))[: len(texts) * 2 // 3]
    shuffled = read(llm, [texts[i] for i in order], layer)
    alone = [read(llm, [text], layer)[0] for text in texts]
    torch.set_num_threads(1)
    one_thread = [read(llm, [text], layer)[0] for text in texts[::3]]
    torch.set_num_threads(threads)
    result = {
        "model": os.path.basename(arguments.model),
        "dtype": str(llm.torch_dtype).removeprefix("torch."),
        "layer": layer,
        "isa": os.environ.get("ONEDNN_MAX_CPU_ISA", "unset"),
        "threads": threads,
        "n_texts": len(texts),
        "packs": llm._forward_pass.packing(layer),
        "shuffled": differing(shuffled, [together[i] for i in order]),
        "alone": differing(alone, together),
        "alone, one thread": differing(one_thread, together[::3]),
    }
    for name, value in result.items():
        print(f"{name:20} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
