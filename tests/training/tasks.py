"""A small task for the tests of training, and a training with settings for it."""

import numpy as np
import torch

from sklearn_relish.head.losses import HuberLoss
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.training.trainer import Examples, new_head, train_head

CPU = torch.device("cpu")


def task(n_texts, seed=0, size=12, noise=0.0):
    """Texts whose number is the first component of their loudest token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (n_texts,), generator=generator)
    values = torch.randn(int(lengths.sum()), size, generator=generator)
    states = TokenStates.from_lengths(values, lengths)
    y = np.array([float(text[text[:, 1].argmax(), 0]) for text in values.split(lengths.tolist())])
    y = y + noise * torch.randn(n_texts, generator=generator).numpy()
    return Examples.of(states, y[:, None], np.ones(n_texts))


def train(examples, validation=None, seed=0, head=None, **changes):
    head = head or new_head(
        seed, input_size=12, latent_size=32, n_heads=4, n_iterations=2, state_norm=None
    )
    settings = {
        "loss_fn": HuberLoss(),
        "learning_rate": 3e-3,
        "weight_decay": 0.01,
        "batch_size": 32,
        "max_epochs": 8,
        "n_iter_no_change": 8,
        "seed": seed,
        "device": CPU,
    }
    return head, train_head(head, examples, validation, **(settings | changes))
