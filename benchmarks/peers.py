"""What the other files compare with: a textbook head and its loop, and what the machine reaches."""

import copy
import math
import time

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from sklearn_relish.head.head import RMS_EPSILON, RelishHead
from sklearn_relish.head.losses import HuberLoss
from sklearn_relish.states.token_states import TokenStates


class TextbookHead(nn.Module):
    """The published layout from PyTorch's own parts, with a copy of a `RelishHead`'s weights.

    Each iteration has a block of its own, also where the head's share one.
    """

    def __init__(self, head: RelishHead):
        super().__init__()
        self.state_norm = head.state_norm
        self.projection = nn.Linear(head.projection.in_features, head.projection.out_features)
        self.projection.load_state_dict(head.projection.state_dict())
        self.latent = nn.Parameter(head.latent.detach().clone())
        self.attentions, self.rest = nn.ModuleList(), nn.ModuleList()
        for i in range(head.n_iterations):
            block = head.blocks[i % len(head.blocks)]
            theirs = block.attention
            attention = nn.MultiheadAttention(len(head.latent), theirs.n_heads, batch_first=True)
            three = (theirs.query, theirs.key, theirs.value)
            attention.in_proj_weight.data = torch.cat([part.weight.detach() for part in three])
            attention.in_proj_bias.data = torch.cat([part.bias.detach() for part in three])
            attention.out_proj.load_state_dict(theirs.output.state_dict())
            self.attentions.append(attention)
            d = len(head.latent)
            mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
            mlp.load_state_dict(block.mlp.state_dict())
            norms = copy.deepcopy(block.attention_norm), copy.deepcopy(block.mlp_norm)
            self.rest.append(nn.ModuleList([norms[0], mlp, norms[1]]))
        self.readout = nn.Linear(head.readout.in_features, head.readout.out_features)
        self.readout.load_state_dict(head.readout.state_dict())

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        states = states.float()
        if self.state_norm == "rms":
            states = nn.functional.rms_norm(states, states.shape[-1:], eps=RMS_EPSILON)
        context = self.projection(states)
        latent = self.latent.expand(len(states), 1, -1)
        for attention, (first_norm, mlp, second_norm) in zip(
            self.attentions, self.rest, strict=True
        ):
            gathered, _ = attention(
                latent, context, context, key_padding_mask=~mask, need_weights=False
            )
            latent = first_norm(latent + gathered)
            latent = second_norm(latent + mlp(latent))
        return self.readout(latent[:, 0])


def padded(examples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """A `DataLoader`'s batch: states padded to the longest, which are real, and the targets."""
    texts, y = zip(*examples, strict=True)
    lengths = torch.tensor([len(text) for text in texts])
    states = pad_sequence(texts, batch_first=True)
    return states, torch.arange(states.shape[1]) < lengths[:, None], torch.stack(y)


class Textbook:
    """A textbook training: shuffled batches from a `DataLoader`, AdamW, the same schedule."""

    def __init__(self, head: RelishHead, device: torch.device, total_steps: int):
        self.head = TextbookHead(head).to(device)
        self.device = device
        self.loss = nn.HuberLoss()
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=5e-4, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=5e-4, total_steps=total_steps
        )

    def step(self, states: Tensor, mask: Tensor, y: Tensor) -> None:
        states, mask, y = (tensor.to(self.device) for tensor in (states, mask, y))
        loss = self.loss(self.head(states, mask).float(), y)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()

    def answers(self, states: TokenStates) -> Tensor:
        examples = [(text, torch.zeros(1)) for text in states]
        with torch.inference_mode():
            batches = DataLoader(examples, batch_size=32, collate_fn=padded)
            return torch.cat(
                [
                    self.head(s.to(self.device), m.to(self.device)).float().cpu()
                    for s, m, _ in batches
                ]
            )


def textbook_fit(
    head: RelishHead,
    states: TokenStates,
    y: Tensor,
    validation: TokenStates,
    validation_y: Tensor,
    *,
    epochs: int,
    device: torch.device,
    seed: int,
) -> Textbook:
    """A fit as most people write it; the weights of the best epoch on held-out texts are kept."""
    training = Textbook(head, device, epochs * math.ceil(len(states) / 32))
    loader = DataLoader(
        list(zip(states, y, strict=True)),
        batch_size=32,
        shuffle=True,
        collate_fn=padded,
        generator=torch.Generator().manual_seed(seed),
    )
    best, weights = math.inf, None
    for _ in range(epochs):
        for batch, mask, targets in loader:
            training.step(batch, mask, targets)
        loss = float(training.loss(training.answers(validation), validation_y))
        if loss < best:
            best, weights = loss, copy.deepcopy(training.head.state_dict())
    training.head.load_state_dict(weights)
    return training


def settings(batch_size: int, epochs: int, device: torch.device, seed: int = 0) -> dict:
    """Arguments of `train_head`: the defaults of the estimator, with the published loss."""
    return {
        "loss_fn": HuberLoss(),
        "learning_rate": 5e-4,
        "weight_decay": 0.01,
        "batch_size": batch_size,
        "max_epochs": epochs,
        "n_iter_no_change": None,
        "seed": seed,
        "device": device,
    }


def largest_product(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Multiplications and additions that a large matrix product does in a second."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        product = a @ b
        float(product[0, 0])  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
