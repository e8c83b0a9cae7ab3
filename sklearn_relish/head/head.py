"""The RELISH head: one latent state, refined by attention to a text's token states.

The network of Su and Lease (arXiv 2604.01206): project the token states, let a learned latent state
attend to them a few times, and read the prediction off the latent state. Shapes in the comments use
B texts, S tokens, input size D, latent size d, n_heads attention heads of size h.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sklearn_relish.utils.messages import name_rows

LATENT_STD = 0.02  # of the initial latent state's entries
MLP_RATIO = 4  # hidden units of a block's MLP, in latent sizes
RMS_EPSILON = 1e-6  # added to the mean square of a token's state


class Context(NamedTuple):
    """The tokens that a latent state attends to: each is ``scale * (W x) + b`` of its state x.

    Parameters
    ----------
    tokens : Tensor of shape (B, S, d) or (B, S, D)
        The projected states W x, or the states x if W is in `folded`. Of pairs, with the scale, and
        with what their differences add.
    folded : Tensor of shape (d, D) or None
        W, if the attention is to multiply its key and value weights by it.
    bias : Tensor of shape (d,)
        b.
    scale : Tensor of shape (B, 1, S) or None
        One over the root mean square of each state. None: 1.
    padding : Tensor of shape (B, 1, S)
        0 on real tokens, minus infinity on padding.
    """

    tokens: Tensor
    folded: Tensor | None
    bias: Tensor
    scale: Tensor | None
    padding: Tensor


class Step(NamedTuple):
    """One iteration: the latent states after it, (B, d), and its attention, (B, n_heads, S)."""

    latent: Tensor
    attention: Tensor


class LatentAttention(nn.Module):
    """Multi-head attention from one latent state to the tokens of its text.

    It has the parameters of `torch.nn.MultiheadAttention` and computes the same function,
    rearranged for a single query. With a head's key weights K, value weights V and value bias v,
    and a token c, the score ``q·(K c)`` is ``(Kᵀ q)·c``, and the value ``Σ p (V c + v)`` is
    ``V (Σ p c) + v``. So keys and values of the tokens are never computed. If c is ``W x + b``, W
    can be multiplied into K and V, and c is not computed either.

    Parameters
    ----------
    latent_size : int
        Size d of the latent state and of the projected token states.
    n_heads : int
        Number of attention heads; must divide `latent_size`.
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
        """What the latent states gather from the tokens, (B, d), and the weights, (B, n_heads, S).

        `latent` is (B, d), or (1, d) if it is the same for all texts.
        """
        tokens, folded, bias, scale, padding = context  # C is d, or D if W is folded
        head_size = latent.shape[1] // self.n_heads
        key, value = self.key.weight, self.value.weight  # (d, d)
        if folded is not None:
            key, value = key @ folded, value @ folded  # (d, D)
        key = key.view(self.n_heads, head_size, -1)  # (n_heads, h, C)
        value = value.view(self.n_heads, head_size, -1)  # (n_heads, h, C)

        query = self.query(latent).view(-1, self.n_heads, head_size)  # (B, n_heads, h)
        query = torch.einsum("bnh,nhc->bnc", query / math.sqrt(head_size), key)  # (B, n_heads, C)
        # The biases b and of the key add the same to all scores of a query: softmax drops them.
        scores = query @ tokens.transpose(1, 2)  # (B, n_heads, S)
        if scale is not None:
            scores = scores * scale
        weights = (scores + padding).softmax(dim=-1)  # (B, n_heads, S), of sum 1

        scaled = weights if scale is None else weights * scale
        gathered = torch.einsum("bnc,nhc->bnh", scaled @ tokens, value).flatten(1)  # (B, d)
        gathered = gathered + linear(bias, self.value.weight, self.value.bias)
        return self.output(gathered), weights


class RefinementBlock(nn.Module):
    """One iteration: attend to the tokens, then an MLP, each added and layer-normalized.

    Parameters
    ----------
    latent_size : int
        Size d of the latent state and of the projected token states.
    n_heads : int
        Number of attention heads; must divide `latent_size`.
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
        """The latent states, refined once."""
        gathered, weights = self.attention(latent, context)  # (B, d), (B, n_heads, S)
        latent = self.attention_norm(latent + gathered)  # (B, d)
        latent = self.mlp_norm(latent + self.mlp(latent))  # (B, d)
        return Step(latent, weights)


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
        Numbers predicted for a text.
    share_weights : bool, default=False
        Whether all iterations use the weights of one block.
    state_norm : {"rms", None}, default="rms"
        ``"rms"`` divides each token's state by its root mean square. None, the published choice,
        uses the states as they are.
    pair : bool, default=False
        Whether the texts are pairs. Then ``V |t - u|`` is added to each projected token t, where u
        is the projection of its match in the other text, and V a matrix of weights. This is not
        part of the published method.
    both_orders : bool, default=False
        Whether the pairs are read in both orders. Then ``U (s - r)`` is added to each projected
        token, where s is its normalized state, r that of the same token in the other order, and U a
        matrix of weights: a state depends on what is before the token, so the difference shows what
        the other text of the pair changes. This is not part of the published method.

    Raises
    ------
    ValueError
        If `latent_size` is not a multiple of `n_heads`, `state_norm` is unknown, or `both_orders`
        is True but `pair` is not.

    Attributes
    ----------
    sizes : dict
        The arguments of the constructor.

    References
    ----------
    Su and Lease, "LLM REgression with a Latent Iterative State Head", arXiv 2604.01206.

    Examples
    --------
    >>> import torch
    >>> from sklearn_relish import RelishHead
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
        pair: bool = False,
        both_orders: bool = False,
    ) -> None:
        super().__init__()
        check_head_sizes(latent_size, n_heads)
        if state_norm not in ("rms", None):
            raise ValueError(f"state_norm must be 'rms' or None, got {state_norm!r}.")
        if both_orders and not pair:
            raise ValueError("both_orders=True needs pair=True: only pairs have two orders.")
        self.sizes: dict[str, Any] = {
            "input_size": input_size,
            "latent_size": latent_size,
            "n_heads": n_heads,
            "n_iterations": n_iterations,
            "n_outputs": n_outputs,
            "share_weights": share_weights,
            "state_norm": state_norm,
            "pair": pair,
            "both_orders": both_orders,
        }
        self.n_iterations = n_iterations
        self.state_norm = state_norm
        self.projection = nn.Linear(input_size, latent_size)
        self.difference = nn.Linear(latent_size, latent_size, bias=False) if pair else None
        self.order_difference = (
            nn.Linear(input_size, latent_size, bias=False) if both_orders else None
        )
        self.latent = nn.Parameter(torch.empty(latent_size).normal_(std=LATENT_STD))
        self.blocks = nn.ModuleList(
            RefinementBlock(latent_size, n_heads)
            for _ in range(1 if share_weights else n_iterations)
        )
        self.readout = nn.Linear(latent_size, n_outputs)

    def forward(
        self,
        states: Tensor,
        mask: Tensor,
        matches: Tensor | None = None,
        others: Tensor | None = None,
    ) -> Tensor:
        """Predict for each text of a padded batch.

        Parameters
        ----------
        states : Tensor of shape (B, S, D)
            Token states. The values in the padding have no influence.
        mask : bool Tensor of shape (B, S)
            True on real tokens. Each text needs at least one, and they come before the padding.
        matches : int64 Tensor of shape (B, S), default=None
            For each token of a pair of texts, the position of its match; its own position for a
            token that has none, and -1 for one that is compared with the mean of the text. Used,
            and needed, only if `pair` is True.
        others : Tensor of shape (B, S, D), default=None
            The state of each token in the text with the pair in the other order; the token's own
            state if it has none. Used, and needed, only if `both_orders` is True.

        Returns
        -------
        Tensor of shape (B, n_outputs)

        Raises
        ------
        ValueError
            If the mask has no real token for a text, the texts have no matches but `pair` is True,
            or they have no states in the other order but `both_orders` is True.

        Examples
        --------
        >>> import torch
        >>> from sklearn_relish import RelishHead
        >>> head = RelishHead(input_size=16, latent_size=8, n_heads=2)
        >>> head(torch.randn(2, 7, 16), torch.ones(2, 7, dtype=torch.bool)).shape
        torch.Size([2, 1])
        """
        if others is not None:
            others = zero_padding(others, mask)
        return self.forward_zero_padded(zero_padding(states, mask), mask, matches, others)

    def forward_zero_padded(
        self,
        states: Tensor,
        mask: Tensor,
        matches: Tensor | None = None,
        others: Tensor | None = None,
    ) -> Tensor:
        """The same as `forward`, without its check and copy: the padding must hold zeros.

        Examples
        --------
        >>> import torch
        >>> from sklearn_relish import RelishHead
        >>> head = RelishHead(input_size=16, latent_size=8, n_heads=2)
        >>> states, mask = torch.randn(2, 7, 16), torch.ones(2, 7, dtype=torch.bool)
        >>> head.forward_zero_padded(states, mask).shape
        torch.Size([2, 1])
        """
        *_, last = self.steps(states, mask, matches, others)
        return self.readout(last.latent)  # (B, n_outputs)

    def staged(
        self,
        states: Tensor,
        mask: Tensor,
        matches: Tensor | None = None,
        others: Tensor | None = None,
    ) -> Tensor:
        """The prediction after each iteration, (n_iterations, B, n_outputs).

        The padding must hold zeros.

        Examples
        --------
        >>> import torch
        >>> from sklearn_relish import RelishHead
        >>> head = RelishHead(input_size=16, latent_size=8, n_heads=2, n_iterations=3)
        >>> head.staged(torch.randn(2, 7, 16), torch.ones(2, 7, dtype=torch.bool)).shape
        torch.Size([3, 2, 1])
        """
        steps = self.steps(states, mask, matches, others)
        return torch.stack([self.readout(step.latent) for step in steps])

    def steps(
        self,
        states: Tensor,
        mask: Tensor,
        matches: Tensor | None = None,
        others: Tensor | None = None,
    ) -> Iterator[Step]:
        """The iterations, one by one. The padding must hold zeros.

        Examples
        --------
        >>> import torch
        >>> from sklearn_relish import RelishHead
        >>> head = RelishHead(input_size=16, latent_size=8, n_heads=2)
        >>> states, mask = torch.randn(2, 7, 16), torch.ones(2, 7, dtype=torch.bool)
        >>> for step in head.steps(states, mask):
        ...     tuple(step.latent.shape), tuple(step.attention.shape)
        ((2, 8), (2, 2, 7))
        ((2, 8), (2, 2, 7))
        ((2, 8), (2, 2, 7))
        """
        context = self._context(states, mask, matches, others)
        latent = self.latent[None]  # (1, d): all texts begin with the same state
        for iteration in range(self.n_iterations):
            step = self.blocks[iteration % len(self.blocks)](latent, context)
            latent = step.latent  # (B, d)
            yield step

    def truncated(self, n_iterations: int, weights: dict[str, Tensor] | None = None) -> RelishHead:
        """A head with the first iterations of this one.

        Parameters
        ----------
        n_iterations : int
            At most as many as this head has.
        weights : dict of str to Tensor, default=None
            A state dict of this head. None: its weights.

        Returns
        -------
        RelishHead
            With copies of the weights, on the CPU.

        Examples
        --------
        >>> from sklearn_relish import RelishHead
        >>> RelishHead(input_size=16, latent_size=8, n_heads=2).truncated(1).n_iterations
        1
        """
        with torch.device("meta"):
            head = RelishHead(**self.sizes | {"n_iterations": n_iterations})
        weights = self.state_dict() if weights is None else weights
        kept = {name: weights[name].to("cpu", copy=True) for name in head.state_dict()}
        head.load_state_dict(kept, assign=True)
        return head.eval()

    def _context(
        self, states: Tensor, mask: Tensor, matches: Tensor | None, others: Tensor | None
    ) -> Context:
        """The tokens to attend to: projected, or not where folding the projection is cheaper."""
        weight, bias = self.projection.weight, self.projection.bias  # (d, D), (d,)
        states = states.to(weight.dtype)  # (B, S, D)
        padding = torch.zeros_like(mask, dtype=weight.dtype)  # (B, S)
        padding = padding.masked_fill_(~mask, -math.inf)[:, None]  # (B, 1, S)
        scale = rms_scale(states)[:, None] if self.state_norm == "rms" else None  # (B, 1, S)
        if self.difference is not None:
            if matches is None:
                raise ValueError(
                    "The heads compare the tokens of two texts, but which token matches which is"
                    " not known: pass matches, or a model that maps tokens to pieces of the text,"
                    " as in fit."
                )
            tokens = linear(states, weight)  # (B, S, d)
            if scale is not None:
                tokens = tokens * scale.transpose(1, 2)
            if self.order_difference is not None:
                differences = self._order_differences(states, scale, others)
                tokens = tokens + self.order_difference(differences)
            differences = match_differences(tokens, mask, matches)
            return Context(tokens + self.difference(differences), None, bias, None, padding)
        if self._folding_is_cheaper(*states.shape):
            return Context(states, weight, bias, scale, padding)
        return Context(linear(states, weight), None, bias, scale, padding)  # tokens (B, S, d)

    def _order_differences(
        self, states: Tensor, scale: Tensor | None, others: Tensor | None
    ) -> Tensor:
        """What the other text of a pair changes in the normalized state of a token, (B, S, D)."""
        if others is None:
            raise ValueError(
                "The heads compare the states of both orders of a pair, but which token of the"
                " other order is the same one is not known: pass others, or a model that maps"
                " tokens to pieces of the text, as in fit."
            )
        others = others.to(states.dtype)
        if scale is None:
            return states - others
        own = states * scale.transpose(1, 2)
        return own.addcmul_(others, rms_scale(others)[..., None], value=-1)

    def _folding_is_cheaper(self, n_texts: int, n_tokens: int, input_size: int) -> bool:
        """Whether a training step needs fewer multiplications if the tokens are not projected.

        Counted for a text, forward and backward. The states themselves need no gradient.
        """
        d, n_scores = len(self.latent), self.n_iterations * self.sizes["n_heads"]
        projecting = 2 * n_tokens * input_size * d
        attending_projected = 6 * n_scores * n_tokens * d + 6 * self.n_iterations * d * d
        folding = 6 * self.n_iterations * d * d * input_size / n_texts
        attending_folded = (
            4 * n_scores * n_tokens * input_size + 6 * self.n_iterations * d * input_size
        )
        return folding + attending_folded < projecting + attending_projected


def check_head_sizes(latent_size: int, n_heads: int) -> None:
    """Raise a ValueError unless the latent state can be divided among the attention heads."""
    if latent_size % n_heads:
        raise ValueError(
            f"latent_size={latent_size} is not a multiple of n_heads={n_heads}: each head works on"
            " an equal part of the latent state."
        )


def zero_padding(states: Tensor, mask: Tensor) -> Tensor:
    """States with zeros in the padding. Raise a ValueError if a text has no token."""
    empty = (~mask.any(dim=1)).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(
            f"The mask is False for all tokens of {name_rows(empty)}: each text needs at least one"
            " real token."
        )
    return states.masked_fill(~mask[:, :, None], 0.0)  # (B, S, D)


def match_differences(tokens: Tensor, mask: Tensor, matches: Tensor) -> Tensor:
    """``|t - u|`` for each token t and its match u, (B, S, d); see `RelishHead.forward`.

    Examples
    --------
    >>> import torch
    >>> tokens = torch.tensor([[[1.0], [3.0]]])
    >>> mask = torch.ones(1, 2, dtype=torch.bool)
    >>> match_differences(tokens, mask, torch.tensor([[1, -1]]))  # -1: the mean of the text
    tensor([[[2.],
             [1.]]])
    """
    size = tokens.shape[2]
    center = tokens.sum(dim=1) / mask.sum(dim=1)[:, None]  # (B, d)
    choices = torch.cat([center[:, None], tokens], dim=1)  # (B, 1 + S, d)
    rows = (1 + matches).masked_fill(~mask, 0)  # (B, S)
    return (tokens - choices.gather(1, rows[:, :, None].expand(-1, -1, size))).abs()


def rms_scale(states: Tensor) -> Tensor:
    """One over the root mean square of each token's state, (B, S).

    Multiplication by it is `torch.nn.functional.rms_norm`, up to rounding. The head multiplies
    scores by it, so that it needs no normalized copy of the states.
    """
    dtype = torch.promote_types(states.dtype, torch.float32)
    norm = torch.linalg.vector_norm(states, dim=-1, dtype=dtype)
    return (norm.square() / states.shape[-1] + RMS_EPSILON).rsqrt().to(states.dtype)
