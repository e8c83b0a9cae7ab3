"""What loading a model up to a layer costs: bytes read, memory and seconds.

    pip install -e ".[benchmarks]" && python benchmarks/layers.py --model MODEL

Each layer is measured in a process of its own (Linux), with the imports, the configuration and the
tokenizer done before, and the weights' file dropped from the page cache (posix_fadvise):

- tensors: bytes of the network's weights and buffers;
- read: bytes that the process got from the disk (`read_bytes` of /proc/self/io) while it loaded
  the layers and read one text, the system's readahead included. A weight that is mapped from the
  file is read when it is first used, so loading alone would show too little;
- own: the process's anonymous memory (RssAnon) after that, beyond the memory before, and its peak;
  weights that are mapped from the file are not in it;
- seconds until the layers are loaded, without the text;
- deeper: bytes read and seconds when the rest of the layers is requested afterwards.

MODEL is a Hub id, a folder or a .gguf file.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from sklearn_relish import FrozenLLM

MEGABYTE = 1e6


def own_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def read_from_disk() -> int:
    return int(Path("/proc/self/io").read_text().partition("\nread_bytes:")[2].split()[0])


def drop_from_page_cache(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(model: str, layer: int, dtype: str) -> dict[str, float]:
    """Load up to a layer and read a text, in this process."""
    llm = FrozenLLM(model, device="cpu", dtype=dtype)
    text = " ".join(["A text of some words."] * 20)
    llm.tokens([text], max_length=512)  # loads configuration and tokenizer
    drop_from_page_cache(Path(llm._source))
    before, peak, done = own_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    disk, start = read_from_disk(), time.perf_counter()
    network = llm._forward_pass_to(layer).network
    seconds = time.perf_counter() - start
    tensors = sum(tensor.nbytes for tensor in [*network.parameters(), *network.buffers()])
    list(llm.read([text], layers=[layer], max_length=512))
    done.set()
    watcher.join()
    found = {
        "tensors": tensors / MEGABYTE,
        "read": (read_from_disk() - disk) / MEGABYTE,
        "own": (own_memory() - before) / MEGABYTE,
        "peak": (peak[0] - before) / MEGABYTE,
        "seconds": seconds,
    }
    disk, start = read_from_disk(), time.perf_counter()
    llm._forward_pass_to(llm.n_layers)
    found["deeper_seconds"] = time.perf_counter() - start
    list(llm.read([text], layers=[llm.n_layers], max_length=512))
    return found | {"deeper_read": (read_from_disk() - disk) / MEGABYTE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        layer, dtype = arguments.measure
        print(json.dumps(measure(arguments.model, int(layer), dtype)))
        return
    n_layers = FrozenLLM(arguments.model).n_layers
    layers = arguments.layers or [round(n_layers * part) for part in (0.2, 0.4, 0.6, 1)]

    print(
        "| dtype | layer | tensors, MB | read, MB | own, MB | peak, MB | seconds |"
        " deeper: read, MB | deeper: seconds |\n" + "| --- " * 9 + "|"
    )
    command = [sys.executable, __file__, "--model", arguments.model, "--measure"]
    subprocess.run([*command, "1", "bfloat16"], stdout=-1, check=True)  # libraries are cached now
    for dtype in arguments.dtypes:
        for layer in layers:
            run = subprocess.run([*command, str(layer), dtype], stdout=-1, check=True)
            found = json.loads(run.stdout)
            cells = [f"{found[name]:.0f}" for name in ("tensors", "read", "own", "peak")]
            cells += [f"{found['seconds']:.2f}", f"{found['deeper_read']:.0f}"]
            row = [dtype, str(layer), *cells, f"{found['deeper_seconds']:.2f}"]
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
