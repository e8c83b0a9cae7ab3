"""STS-B: the published configuration and the defaults, side by side.

    python benchmarks/stsb.py --data FOLDER --model MODEL

FOLDER holds train.csv, dev.csv and test.csv with the columns text_a, text_b and score (0 to 5): the
STS benchmark, on the Hugging Face Hub as GLUE's "stsb". MODEL is a Hub id, a folder or a .gguf
file; the README's figures stand on SmolLM2-135M-Instruct, a GGUF file of 4 bits. The head is fitted
on train.csv, a tenth of it held out for early stopping; test.csv is read once for the figures.
"""

import argparse
import json
import time
from pathlib import Path

import pandas as pd
from scipy.stats import pearsonr, spearmanr

from sklearn_relish import RelishRegressor, StateStore

# The question at the end gives the last layer of a causal model something to answer.
PROMPT = "Sentence 1: {text_a}\nSentence 2: {text_b}\nSimilarity score:"
PUBLISHED = {"layer": -1, "state_norm": None}
CONFIGURATIONS = {"published": PUBLISHED, "defaults": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the three files")
    parser.add_argument("--model", required=True, help="Hub id, folder or .gguf file")
    parser.add_argument("--memory", help="folder where token states are kept between runs")
    parser.add_argument("--bits", type=int, help="8: keep states in 8 bits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file that JSON lines are appended to")
    arguments = parser.parse_args()

    train, test = (
        pd.read_csv(arguments.data / f"{split}.csv", keep_default_na=False)
        for split in ("train", "test")
    )
    columns = ["text_a", "text_b"]
    print(f"{len(train)} training and {len(test)} test rows, {arguments.model}")
    print(f"{'configuration':<15}{'seed':>5}{'r':>8}{'rho':>8}{'NRMSE':>8}{'seconds':>9}")
    for name, parameters in CONFIGURATIONS.items():
        for seed in range(arguments.seeds):
            regressor = RelishRegressor(
                arguments.model,
                prompt=PROMPT,
                memory=StateStore(arguments.memory, bits=arguments.bits),
                random_state=seed,
                verbose=1,
                **parameters,
            )
            start = time.perf_counter()
            regressor.fit(train[columns], train["score"])
            predicted = regressor.predict(test[columns])
            error = ((predicted - test["score"]) ** 2).mean() ** 0.5
            figures = {
                "configuration": name,
                "seed": seed,
                "r": 100 * pearsonr(predicted, test["score"]).statistic,
                "rho": 100 * spearmanr(predicted, test["score"]).statistic,
                "nrmse": 100 * error / (test["score"].max() - test["score"].min()),
                "seconds": time.perf_counter() - start,
            }
            print(
                "{configuration:<15}{seed:>5}{r:>8.2f}{rho:>8.2f}{nrmse:>8.2f}{seconds:>9.1f}".format(
                    **figures
                ),
                flush=True,
            )
            if arguments.output:
                with arguments.output.open("a") as file:
                    file.write(json.dumps({"model": arguments.model, **figures}) + "\n")


if __name__ == "__main__":
    main()
