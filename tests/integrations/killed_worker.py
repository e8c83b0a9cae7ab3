"""The package as worker processes of the guide's code see it: logged, in small pieces, mortal.

Reading logs each text that went through the model. While there is a file `kill`, the first process
to complete its third pass takes this file and is killed before it has saved the states of that
pass.

Its import changes the package, so only worker processes may import it (see `conftest.py`).
"""

import json
import os
import signal
from pathlib import Path

import torch

import sklearn_relish
from sklearn_relish.llm.batching import TOKEN_BUDGET
from sklearn_relish.states import reading, retention

torch.set_num_threads(1)
reading.PIECE_TEXTS = 8  # texts of a lease
reading.PIECE_SECONDS = 0.0
reading.POLL_SECONDS = 0.01
retention.SHARD_BYTES = 1  # each pass is saved
TOKEN_BUDGET["cpu"] = 64  # a pass is some texts
KILLED_IN_PASS = 3


class LoggedLLM(sklearn_relish.FrozenLLM):
    n_passes = 0

    def _read_batch(self, tokens, layers):
        states = super()._read_batch(tokens, layers)
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]
        folder = Path(self.model).parent
        with open(folder / "log", "a") as file:  # a line is appended in one piece
            file.write(json.dumps([os.getpid(), texts]) + "\n")
        self.n_passes += 1
        if self.n_passes >= KILLED_IN_PASS and (folder / "kill").exists():
            try:
                (folder / "kill").rename(folder / "taken")
            except FileNotFoundError:  # another process has taken it
                return states
            (folder / "killed").write_text(json.dumps([os.getpid(), texts]))
            os.kill(os.getpid(), signal.SIGKILL)
        return states


_llms = {}  # one of each model in a process, as for a model given by name


def logged(model, dtype):
    if (model, dtype) not in _llms:
        _llms[model, dtype] = LoggedLLM(model, device="cpu", dtype=dtype)
    return _llms[model, dtype]


class RelishRegressor(sklearn_relish.RelishRegressor):
    @classmethod
    def from_pretrained(cls, folder):
        regressor = super().from_pretrained(folder)
        llm = logged(regressor.model, regressor.dtype)
        return regressor.set_params(model=llm, dtype="auto")


class LLMEncoder(sklearn_relish.LLMEncoder):
    def __init__(self, model, *, memory, dtype):
        super().__init__(logged(model, dtype), memory=memory)
