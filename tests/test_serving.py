"""The service of ``examples/serve_fastapi.py``: batches, limits, errors and shutdown."""

import asyncio
import json
import socket
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_model

from sklearn_relish import RelishRegressor

pytest.importorskip("fastapi", reason="pip install -e '.[test]'")
uvicorn = pytest.importorskip("uvicorn", reason="pip install -e '.[test]'")
EXAMPLES = Path(__file__).parent.parent / "examples"
if not EXAMPLES.exists():  # tests of an installed package
    pytest.skip("there are no examples", allow_module_level=True)
sys.path.append(str(EXAMPLES))
import serve_fastapi  # noqa: E402

try:
    import httpx2 as httpx  # huggingface_hub needs one of the two
except ModuleNotFoundError:
    import httpx

SECONDS = 20  # for what should take none


@pytest.fixture(scope="module")
def regressor():
    texts = [f"film {i}" for i in range(20)]
    regressor = RelishRegressor(tiny_model(), max_epochs=1, n_estimators=1, random_state=0)
    return regressor.fit(texts, np.arange(20.0))


class Gate:
    """A regressor whose predictions wait until the gate is open; it records the texts of calls."""

    def __init__(self, regressor):
        self.regressor = regressor
        self.calls = []
        self.is_open = threading.Event()
        self.is_open.set()

    def predict(self, texts):
        self.calls.append(texts)
        assert self.is_open.wait(SECONDS)
        if "fails" in texts:
            raise RuntimeError("This text fails.")
        return self.regressor.predict(texts)


@pytest.fixture
def gate(regressor):
    gate = Gate(regressor)
    yield gate
    gate.is_open.set()


@asynccontextmanager
async def service(gate):
    """A client of the running service; its startup is not in the recorded calls."""
    app = serve_fastapi.create_app(gate)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        httpx.AsyncClient(transport=transport, base_url="http://service") as client,
        app.router.lifespan_context(app),
    ):
        assert len(gate.calls) == 1  # the language model is loaded
        gate.calls.clear()
        yield client


async def until(condition):
    async with asyncio.timeout(SECONDS):
        while not await condition():
            await asyncio.sleep(0.001)


async def send_during_a_prediction(client, gate, requests):
    """Tasks of a first request, which is being predicted, and of `requests`, which wait."""

    async def predicting():
        return bool(gate.calls)

    async def waiting():
        return (await client.get("/health")).json()["waiting"] == len(tasks) - 1

    gate.is_open.clear()
    tasks = [asyncio.create_task(client.post("/predict", json={"texts": ["first"]}))]
    await until(predicting)
    for texts in requests:
        tasks.append(asyncio.create_task(client.post("/predict", json={"texts": texts})))
        await until(waiting)
    return tasks


def predictions(response):
    assert response.status_code == 200, response.text
    return response.json()["predictions"]


def test_concurrent_requests_are_one_prediction_and_get_their_own_answers(gate, regressor):
    requests = [[f"film {i}", "good"][: 1 + i % 2] for i in range(6)]

    async def run():
        async with service(gate) as client:
            tasks = await send_during_a_prediction(client, gate, requests)
            gate.is_open.set()
            return await asyncio.gather(*tasks)

    first, *others = asyncio.run(run())
    assert gate.calls == [["first"], [text for texts in requests for text in texts]]
    assert predictions(first) == regressor.predict(["first"]).tolist()
    for texts, response in zip(requests, others, strict=True):
        assert predictions(response) == regressor.predict(texts).tolist()


def test_a_full_batch_leaves_requests_to_the_next(gate, monkeypatch):
    monkeypatch.setattr(serve_fastapi, "BATCH", 4)

    async def run():
        async with service(gate) as client:
            tasks = await send_during_a_prediction(client, gate, [["a", "b", "c"]] * 4)
            gate.is_open.set()
            return await asyncio.gather(*tasks)

    assert [len(predictions(response)) for response in asyncio.run(run())] == [1, 3, 3, 3, 3]
    assert [len(texts) for texts in gate.calls] == [1, 6, 6]


def test_a_full_queue_refuses_a_request_at_once(gate, monkeypatch):
    monkeypatch.setattr(serve_fastapi, "MAX_WAITING", 2)

    async def run():
        async with service(gate) as client:
            tasks = await send_during_a_prediction(client, gate, [["a"], ["b"]])
            refused = await client.post("/predict", json={"texts": ["c"]})
            gate.is_open.set()
            accepted = await asyncio.gather(*tasks)
            return refused, accepted, await client.post("/predict", json={"texts": ["c"]})

    refused, accepted, later = asyncio.run(run())
    assert refused.status_code == 503
    assert refused.json() == {"detail": "2 requests are waiting. Try again later."}
    assert refused.headers["Retry-After"] == "1"
    assert [len(predictions(response)) for response in (*accepted, later)] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"texts": []}, "body.texts: List should have at least 1 item"),
        ({"texts": ["a"] * 65}, "body.texts: List should have at most 64 items"),
        ({"texts": ["a", "b" * 20_001]}, "body.texts.1: String should have at most 20000 char"),
        ({"texts": ["a", 3]}, "body.texts.1: Input should be a valid string"),
        ({"texts": ["a", "\ud800"]}, "body.texts.1: Input should be a valid string, unable"),
        ({"text": "a"}, "body.texts: Field required"),
        ("no JSON", "body.0: JSON decode error"),
    ],
)
def test_a_bad_request_is_refused_and_a_good_one_is_answered(gate, body, problem):
    content = body if isinstance(body, str) else json.dumps(body)
    headers = {"Content-Type": "application/json"}

    async def run():
        async with service(gate) as client:
            tasks = await send_during_a_prediction(client, gate, [["good"]])
            bad = await client.post("/predict", content=content, headers=headers)
            gate.is_open.set()
            return bad, await asyncio.gather(*tasks)

    bad, good = asyncio.run(run())
    assert bad.status_code == 422
    (detail,) = bad.json()["detail"]
    assert detail.startswith(problem)
    assert len(detail) < 200  # without the text
    assert [len(predictions(response)) for response in good] == [1, 1]


def test_only_the_request_that_causes_an_error_fails(gate, regressor):
    async def run():
        async with service(gate) as client:
            tasks = await send_during_a_prediction(client, gate, [["a"], ["fails"], ["b"]])
            gate.is_open.set()
            responses = await asyncio.gather(*tasks)
            return responses, await client.post("/predict", json={"texts": ["c"]})

    (first, a, failed, b), later = asyncio.run(run())
    assert failed.status_code == 500
    for text, response in (("first", first), ("a", a), ("b", b), ("c", later)):
        assert predictions(response) == regressor.predict([text]).tolist()


def test_the_end_of_the_lifespan_waits_for_accepted_requests(gate):
    async def run():
        async with service(gate) as client:
            tasks = await send_during_a_prediction(client, gate, [["a"], ["b"]])
            asyncio.get_running_loop().call_later(0.1, gate.is_open.set)
        assert gate.calls == [["first"], ["a", "b"]]
        return await asyncio.wait_for(asyncio.gather(*tasks), SECONDS)

    assert [len(predictions(response)) for response in asyncio.run(run())] == [1, 1, 1]


@pytest.fixture
def server(gate):
    """A running server with its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(serve_fastapi.create_app(gate), log_level="warning")
        server = uvicorn.Server(config)
        server.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        server.thread.start()
        post(server.url, ["the server has started"])
        gate.calls.clear()
        yield server
        gate.is_open.set()
        server.should_exit = True
        server.thread.join(SECONDS)


def test_a_server_that_is_stopped_answers_accepted_requests(gate, server):
    gate.is_open.clear()
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(post, server.url, ["first"])]
        wait_until(lambda: gate.calls)
        answers += [pool.submit(post, server.url, [f"film {i}"]) for i in range(2)]
        wait_until(lambda: waiting(server.url) == 2)
        server.should_exit = True  # as after SIGTERM
        wait_until(lambda: not any(each.is_serving() for each in server.servers))
        gate.is_open.set()
        assert [len(answer.result()["predictions"]) for answer in answers] == [1, 1, 1]
    server.thread.join(SECONDS)
    assert not server.thread.is_alive()


def post(url, texts):
    request = urllib.request.Request(
        f"{url}/predict",
        json.dumps({"texts": texts}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as response:
        return json.load(response)


def waiting(url):
    with urllib.request.urlopen(f"{url}/health", timeout=SECONDS) as response:
        return json.load(response)["waiting"]


def wait_until(condition):
    async def met():
        return condition()

    asyncio.run(until(met))


def test_the_command_loads_a_saved_regressor(regressor, tmp_path, monkeypatch):
    served = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: served.update(options, app=app))
    saved = tmp_path / "films"
    regressor.save_pretrained(saved)
    arguments = ["serve_fastapi.py", str(saved), "--model", str(tiny_model()), "--port", "1234"]
    monkeypatch.setattr(sys, "argv", arguments)
    serve_fastapi.main()

    async def run(app):
        transport = httpx.ASGITransport(app)
        async with (
            httpx.AsyncClient(transport=transport, base_url="http://service") as client,
            app.router.lifespan_context(app),
        ):
            return await client.post("/predict", json={"texts": ["a", "b"]})

    response = asyncio.run(run(served.pop("app")))
    assert predictions(response) == regressor.predict(["a", "b"]).tolist()
    assert served == {"host": "127.0.0.1", "port": 1234}
