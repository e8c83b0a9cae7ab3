"""Serving: how do many clients share one regressor?
=================================================

A folder of ``regressor.save_pretrained("reviews")``, or a Hub repository, behind HTTP. The
regressor was fitted on a list of texts; for a table, change the request to a dict of columns::

    python examples/serve_fastapi.py reviews
    curl localhost:8000/predict -H "Content-Type: application/json" -d '{"texts": ["A good film."]}'

Requests that arrive during a prediction wait for the next one, which answers them together. Limits
bound the texts that wait; limit the size of bodies in the proxy in front of the service. Each
request is checked before it joins a batch.
After SIGTERM, the service answers the requests that it has accepted, and stops.
``benchmarks/serving.py`` measures it.
"""

import argparse
import asyncio
from contextlib import asynccontextmanager
from typing import Annotated, NamedTuple

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from sklearn_relish import RelishRegressor

MAX_CHARACTERS = 20_000  # of a text
MAX_TEXTS = 64  # of a request
BATCH = 64  # a batch takes more requests until it has so many texts
MAX_WAITING = 256  # requests


class PredictRequest(BaseModel):
    texts: list[Annotated[str, Field(max_length=MAX_CHARACTERS)]] = Field(
        min_length=1, max_length=MAX_TEXTS
    )


class Waiting(NamedTuple):
    """A request that waits for its predictions."""

    texts: list[str]
    answer: asyncio.Future[list]


def create_app(regressor: RelishRegressor) -> FastAPI:
    """The service of a fitted regressor, for any ASGI server."""
    queue: asyncio.Queue[Waiting] = asyncio.Queue(MAX_WAITING)

    async def answer(batch: list[Waiting]) -> None:
        texts = [text for request in batch for text in request.texts]
        try:
            rows = iter((await asyncio.to_thread(regressor.predict, texts)).tolist())
        except Exception as error:
            if len(batch) > 1:  # only the request that causes the error fails
                for request in batch:
                    await answer([request])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        for request in batch:
            predictions = [next(rows) for _ in request.texts]
            if not request.answer.done():  # the server may have cancelled the request
                request.answer.set_result(predictions)

    async def work() -> None:
        """Answer all waiting requests together, then those that arrived meanwhile."""
        while True:
            batch = [await queue.get()]
            while not queue.empty() and sum(len(request.texts) for request in batch) < BATCH:
                batch.append(queue.get_nowait())
            await answer(batch)
            for _ in batch:
                queue.task_done()

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        await asyncio.to_thread(regressor.predict, ["Load the language model."])
        worker = asyncio.create_task(work())
        app.state.worker = worker
        yield
        accepted = asyncio.create_task(queue.join())
        await asyncio.wait({accepted, worker}, return_when=asyncio.FIRST_COMPLETED)
        worker.cancel()

    app = FastAPI(title="sklearn-relish", lifespan=lifespan)

    @app.post("/predict")
    async def predict(request: PredictRequest) -> dict[str, list]:
        waiting = Waiting(request.texts, asyncio.get_running_loop().create_future())
        try:
            queue.put_nowait(waiting)
        except asyncio.QueueFull:
            message = f"{MAX_WAITING} requests are waiting. Try again later."
            raise HTTPException(503, message, headers={"Retry-After": "1"}) from None
        return {"predictions": await waiting.answer}

    @app.get("/health")
    async def health() -> dict[str, str | int]:
        if app.state.worker.done():
            raise HTTPException(503, "The worker has ended: restart the service.")
        return {"status": "ok", "waiting": queue.qsize()}

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        """The problems without the texts, which can be long or no valid Unicode."""
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        return JSONResponse({"detail": problems}, status_code=422)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve predictions over HTTP.")
    parser.add_argument("regressor", help="a saved folder or the id of a Hub repository")
    parser.add_argument("--model", help="the place of the language model on this machine")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    changes = {} if options.model is None else {"model": options.model}
    regressor = RelishRegressor.from_pretrained(options.regressor, **changes)
    uvicorn.run(create_app(regressor), host=options.host, port=options.port)


if __name__ == "__main__":
    main()
