"""The RELISH head: one latent state, refined by attention to a text's token states.

The network of Su and Lease (arXiv 2604.01206): project the token states, let a learned latent
attend to them a few times, read the answer off the latent. It knows tensors and nothing else.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sklearn_relish.head.losses import Loss
from sklearn_relish.utils.messages import name_rows
from sklearn_relish.utils.versions import FORMAT, check_format

LATENT_STD = 0.02  # of the initial latent state's entries
MLP_RATIO = 4  # hidden units of a block's MLP, in latent sizes
RMS_EPSILON = 1e-6  # added to the mean square of a token's state
HUBER = Loss("huber")


def check_head_sizes(latent_size: int, n_heads: int) -> None:
    """Raise a ValueError unless the attention heads can share the latent state equally."""
    if latent_size % n_heads:
        raise ValueError(
            f"latent_size={latent_size} is not a multiple of n_heads={n_heads}: each head works on"
            " an equal part of the latent state."
        )


class Context(NamedTuple):
    """Tokens that a latent state attends to: each is ``scale · W x + b`` of its state x.

    `tokens` is (B, S, C): ``W x``, or x where W, (d, C), is left to be folded; `folded` is that W,
    else None. `bias` is b, (d,). `scale` is (B, 1, S), or None for ones; `padding`, (B, 1, S), is 0
    on real tokens and minus infinity elsewhere.
    """

    tokens: Tensor
    folded: Tensor | None
    bias: Tensor
    scale: Tensor | None
    padding: Tensor


class Step(NamedTuple):
    """An iteration: the latent states after it, (B, d), and its attention, (B, n_heads, S)."""

    latent: Tensor
    attention: Tensor


class LatentAttention(nn.Module):
    """Multi-head attention from one latent state to the tokens of its text.

    The parameters and the function of `torch.nn.MultiheadAttention`, rearranged for a single
    query. For a head with key weights K and value weights V, V's bias v and a token c, the score
    ``q·(K c)`` is ``(Kᵀ q)·c`` and the value ``Σ p (V c + v)`` is ``V (Σ p c) + v``: keys and
    values are never formed for each token. Nor need c be, where it is ``W x + b``: K and V take
    W in, and work on x.

    Parameters
    ----------
    latent_size : int
        Size of the latent state and of the projected token states.
    n_heads : int
        Number of attention heads; divides `latent_size`.
    """

    def __init__(self, latent_size: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(latent_size, latent_size)
        self.key = nn.Linear(latent_size, latent_size)
        self.value = nn.Linear(latent_size, latent_size)
        self.output = nn.Linear(latent_size, latent_size)
        for part in (self.query, self.key, self.value, self.output):
            nn.init.zeros_(part.bias)
        # The range that nn.MultiheadAttention gives its (3 * latent_size, latent_size) matrix.
        for part in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(part.weight, gain=math.sqrt(0.5))

    def forward(self, latent: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """What latent states, (B, d), or (1, d) for all texts, gather from the real tokens.

        With it the weights of the tokens, (B, n_heads, S).
        """
        head_size = latent.shape[1] // self.n_heads
        key, value = self.key.weight, self.value.weight  # (d, d)
        if context.folded is not None:
            key, value = key @ context.folded, value @ context.folded  # (d, C)
        key = key.view(self.n_heads, head_size, -1)  # (nh, hs, C)
        value = value.view(self.n_heads, head_size, -1)

        query = self.query(latent).view(-1, self.n_heads, head_size) / math.sqrt(head_size)
        query = torch.einsum("bhs,hsc->bhc", query, key)
        # Biases add the same to a query's score for every token: softmax drops them.
        scores = query @ context.tokens.transpose(1, 2)  # (B, nh, S)
        if context.scale is not None:
            scores = scores * context.scale
        weights = (scores + context.padding).softmax(dim=-1)  # (B, nh, S), of sum 1
        scaled = weights if context.scale is None else weights * context.scale
        attended = torch.einsum("bhc,hsc->bhs", scaled @ context.tokens, value).flatten(1)
        bias = linear(context.bias, self.value.weight, self.value.bias)  # (d,)
        return self.output(attended + bias), weights  # (B, d), (B, nh, S)


class RefinementBlock(nn.Module):
    """One iteration: attend to the tokens, then an MLP, each added and layer-normalized.

    Parameters
    ----------
    latent_size : int
        Size of the latent state and of the projected token states.
    n_heads : int
        Number of attention heads; divides `latent_size`.
    """

    def __init__(self, latent_size: int, n_heads: int) -> None:
        super().__init__()
        self.attention = LatentAttention(latent_size, n_heads)
        self.attention_norm = nn.LayerNorm(latent_size)
        self.mlp = nn.Sequential(
            nn.Linear(latent_size, MLP_RATIO * latent_size),
            nn.GELU(),
            nn.Linear(MLP_RATIO * latent_size, latent_size),
        )
        self.mlp_norm = nn.LayerNorm(latent_size)

    def forward(self, latent: Tensor, context: Context) -> Step:
        """The latent state, refined once."""
        attended, weights = self.attention(latent, context)
        latent = self.attention_norm(latent + attended)  # (B, d)
        return Step(self.mlp_norm(latent + self.mlp(latent)), weights)


class RelishHead(nn.Module):
    """Regression head with a latent state refined by attention to token states.

    Parameters
    ----------
    input_size : int
        Size D of a token's state, the hidden size of the language model.
    latent_size : int, default=256
        Size d of the latent state.
    n_heads : int, default=8
        Number of attention heads; must divide `latent_size`.
    n_iterations : int, default=3
        How often the latent state is refined.
    n_outputs : int, default=1
        Numbers answered for a text.
    share_weights : bool, default=False
        Whether all iterations use the weights of one block.
    state_norm : {"rms", None}, default="rms"
        ``"rms"`` divides each token's state by its root mean square; None, the published choice,
        takes states as they are.

    Raises
    ------
    ValueError
        If `latent_size` is not a multiple of `n_heads`, or `state_norm` is unknown.

    Attributes
    ----------
    sizes : dict
        The arguments that it was made with.

    References
    ----------
    Su and Lease, "RELISH: REgression with a Latent Iterative State Head", arXiv 2604.01206.

    Examples
    --------
    >>> import torch
    >>> from sklearn_relish.head.head import RelishHead
    >>> head = RelishHead(input_size=4096)
    >>> sum(parameter.numel() for parameter in head.parameters())
    3418625
    >>> states = torch.randn(2, 7, 4096)  # 2 texts of up to 7 tokens
    >>> mask = torch.arange(7) < torch.tensor([[7], [5]])  # the second text has 5
    >>> head(states, mask).shape
    torch.Size([2, 1])
    """

    def __init__(
        self,
        input_size: int,
        latent_size: int = 256,
        n_heads: int = 8,
        n_iterations: int = 3,
        n_outputs: int = 1,
        share_weights: bool = False,
        state_norm: str | None = "rms",
    ) -> None:
        super().__init__()
        check_head_sizes(latent_size, n_heads)
        if state_norm not in ("rms", None):
            raise ValueError(f"state_norm must be 'rms' or None, got {state_norm!r}.")
        self.sizes = {
            "input_size": input_size,
            "latent_size": latent_size,
            "n_heads": n_heads,
            "n_iterations": n_iterations,
            "n_outputs": n_outputs,
            "share_weights": share_weights,
            "state_norm": state_norm,
        }
        self.n_iterations = n_iterations
        self.state_norm = state_norm
        self.projection = nn.Linear(input_size, latent_size)
        self.latent = nn.Parameter(torch.empty(latent_size).normal_(std=LATENT_STD))
        self.blocks = nn.ModuleList(
            RefinementBlock(latent_size, n_heads)
            for _ in range(1 if share_weights else n_iterations)
        )
        self.readout = nn.Linear(latent_size, n_outputs)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Answer for each text of a padded batch.

        Parameters
        ----------
        states : Tensor of shape (B, S, D)
            Token states; what stands in the padding has no influence.
        mask : bool Tensor of shape (B, S)
            True on real tokens, of which each text has at least one.

        Returns
        -------
        Tensor of shape (B, n_outputs)

        Raises
        ------
        ValueError
            If the mask has no real token for a text.
        """
        return self.raw_prediction(_without_padding(states, mask), mask)

    def raw_prediction(self, states: Tensor, mask: Tensor) -> Tensor:
        """The same as `forward`, faster, for states whose padding holds finite numbers."""
        *_, last = self.steps(states, mask)
        return self.readout(last.latent)  # (B, n_outputs)

    def staged(self, states: Tensor, mask: Tensor) -> Tensor:
        """The answer after each iteration, (n_iterations, B, n_outputs); the last is `answer`'s."""
        return torch.stack([self.readout(step.latent) for step in self.steps(states, mask)])

    def steps(self, states: Tensor, mask: Tensor) -> Iterator[Step]:
        """The iterations, one by one, of states whose padding holds finite numbers."""
        context = self._context(states, mask)
        latent = self.latent[None]  # (1, d), the same for all texts until they are attended to
        for iteration in range(self.n_iterations):
            step = self.blocks[iteration % len(self.blocks)](latent, context)
            latent = step.latent  # (B, d)
            yield step

    def _context(self, states: Tensor, mask: Tensor) -> Context:
        """The tokens, projected, or as they are where it is cheaper to fold the projection."""
        dtype = self.projection.weight.dtype
        if not torch.is_autocast_enabled(states.device.type):
            states = states.to(dtype)  # (B, S, D)
        padding = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)[:, None]
        scale = None
        if self.state_norm == "rms":
            scale = rms_scale(states)[:, None].to(dtype)
        weight, bias = self.projection.weight, self.projection.bias
        if self._folding_is_cheaper(*states.shape):
            return Context(states, weight, bias, scale, padding)
        return Context(linear(states, weight), None, bias, scale, padding)

    def _folding_is_cheaper(self, n_texts: int, n_tokens: int, input_size: int) -> bool:
        """Whether a training step multiplies less where tokens are never projected.

        Multiplications of a text, forward and backward; states themselves have no gradient.
        """
        d, n_scores = len(self.latent), self.n_iterations * self.blocks[0].attention.n_heads
        projecting = 2 * n_tokens * input_size * d
        attending_projected = 6 * n_scores * n_tokens * d + 6 * self.n_iterations * d * d
        folding = 6 * self.n_iterations * d * d * input_size / n_texts
        attending_folded = (
            4 * n_scores * n_tokens * input_size + 6 * self.n_iterations * d * input_size
        )
        return folding + attending_folded < projecting + attending_projected


class RelishEnsemble(nn.Module):
    """The mean of several heads' responses, and a linear read-out of pooled states beside it.

    An answer is ``share · mean of the heads + V [mean state; last state] + b`` where there is a
    linear path, and the mean of the heads' responses where there is none.

    Parameters
    ----------
    heads : list of RelishHead
        Of one input size, `state_norm` and number of outputs.
    linear_path : bool
        Whether there is a linear path; it has no influence until its weights are set.
    loss_fn : Loss
        Says what the heads' raw answers mean.

    Attributes
    ----------
    share : Tensor of shape (n_outputs,)
        What the heads' mean is multiplied by, 1 at first.
    linear : torch.nn.Linear or None
        From a text's mean and last token state, normalized as the heads', to its answer.
    """

    def __init__(self, heads: list[RelishHead], linear_path: bool, loss_fn: Loss = HUBER) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.loss_fn = loss_fn
        self.state_norm = heads[0].state_norm
        readout, projection = heads[0].readout, heads[0].projection
        self.head_weight = nn.Parameter(torch.ones(readout.out_features), requires_grad=False)
        self.linear = None
        if linear_path:
            # Made without values: initial ones would be drawn from torch's global generator.
            sizes = 2 * projection.in_features, readout.out_features
            self.linear = nn.Linear(*sizes, device="meta").to_empty(device=self.head_weight.device)
            self.linear.requires_grad_(False)
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    @classmethod
    def with_heads(
        cls, known: RelishEnsemble, heads: Iterable[RelishHead], loss_fn: Loss
    ) -> RelishEnsemble:
        """Other heads in the place of a known ensemble's, beside its linear path."""
        ensemble = cls(list(heads), known.linear is not None, loss_fn)
        ensemble.head_weight.copy_(known.head_weight)
        if ensemble.linear is not None:
            ensemble.linear.load_state_dict(known.linear.state_dict())
        return ensemble.eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> RelishEnsemble:
        """A copy as of any other module, not by way of `__getstate__`."""
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Arrays and plain values alone, which open wherever NumPy does."""
        weights = {name: weight.cpu().numpy() for name, weight in self.state_dict().items()}
        return {
            "format": FORMAT,
            "sizes": self.heads[0].sizes,
            "n_heads": len(self.heads),
            "linear_path": self.linear is not None,
            "loss_fn": {
                "name": self.loss_fn.name,
                "quantiles": list(self.loss_fn.quantiles),
            },
            "weights": weights,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        check_format(state, f"The saved {type(self).__name__}")
        loss_fn = Loss(state["loss_fn"]["name"], tuple(state["loss_fn"]["quantiles"]))
        with torch.device("meta"):
            heads = [RelishHead(**state["sizes"]) for _ in range(state["n_heads"])]
            self.__init__(heads, state["linear_path"], loss_fn)
        weights = {name: torch.tensor(array) for name, array in state["weights"].items()}
        self.load_state_dict(weights, assign=True)
        self.eval()

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Answer for each text of a padded batch, as `RelishHead`."""
        return self.raw_prediction(_without_padding(states, mask), mask)

    def raw_prediction(self, states: Tensor, mask: Tensor) -> Tensor:
        """The same as `forward`, faster, for states whose padding holds finite numbers."""
        states = states.to(self.head_weight.dtype)
        inverse_link = self.loss_fn.inverse_link
        answers = sum(inverse_link(head.raw_prediction(states, mask)) for head in self.heads) / len(
            self.heads
        )
        if self.linear is None:
            return answers  # (B, n_outputs)
        return self.head_weight * answers + self.linear(self._pooled(states, mask))

    def attention(self, states: Tensor, mask: Tensor) -> Tensor:
        """Weights of the tokens, (n_estimators, n_iterations, B, n_heads, S), of sum 1."""
        states = states.to(self.head_weight.dtype)
        return torch.stack(
            [
                torch.stack([step.attention for step in head.steps(states, mask)])
                for head in self.heads
            ]
        )

    def staged(self, states: Tensor, mask: Tensor) -> Tensor:
        """The answer after each iteration of the heads, (n_iterations, B, n_outputs)."""
        states = states.to(self.head_weight.dtype)
        inverse_link = self.loss_fn.inverse_link
        answers = torch.stack(
            [
                sum(
                    inverse_link(head.readout(step.latent))
                    for head, step in zip(self.heads, steps, strict=True)
                )
                for steps in zip(*(head.steps(states, mask) for head in self.heads), strict=True)
            ]
        ) / len(self.heads)
        if self.linear is None:
            return answers
        return self.head_weight * answers + self.linear(self._pooled(states, mask))

    def _pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        """Mean and last token state of each text, side by side, (B, 2 D)."""
        scale = mask.to(states.dtype)  # (B, S)
        if self.state_norm == "rms":
            scale = scale * rms_scale(states)
        lengths = mask.sum(dim=1, keepdim=True)  # (B, 1)
        mean = ((scale / lengths)[:, None] @ states)[:, 0]  # (B, D)
        rows, ends = torch.arange(len(states), device=states.device), lengths[:, 0] - 1
        return torch.cat([mean, states[rows, ends] * scale[rows, ends, None]], dim=1)


def _without_padding(states: Tensor, mask: Tensor) -> Tensor:
    """States with zeros in the padding; each text must have a token."""
    empty = (~mask.any(dim=1)).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(
            f"The mask is False for all tokens of {name_rows(empty)}: each text needs at least one"
            " real token."
        )
    return states.masked_fill(~mask[:, :, None], 0.0)


def rms_scale(states: Tensor) -> Tensor:
    """One over the root mean square of each token's state, (B, S), in float32 or finer."""
    dtype = torch.promote_types(states.dtype, torch.float32)
    norm = torch.linalg.vector_norm(states, dim=-1, dtype=dtype)
    return (norm.square() / states.shape[-1] + RMS_EPSILON).rsqrt()
