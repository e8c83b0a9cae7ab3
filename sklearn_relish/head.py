"""The RELISH head: one latent state, refined by attention to a text's token states.

The network of Su and Lease (arXiv 2604.01206): project the token states, let a learned latent
attend to them a few times, read the answer off the latent. It knows tensors and nothing else.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

LATENT_STD = 0.02  # of the initial latent state's entries
MLP_RATIO = 4  # hidden units of a block's MLP, in latent sizes
RMS_EPSILON = 1e-6  # added to the mean square of a token's state


def check_head_sizes(latent_size: int, n_heads: int) -> None:
    """Raise a ValueError unless the attention heads can share the latent state equally."""
    if latent_size % n_heads:
        raise ValueError(
            f"latent_size={latent_size} is not a multiple of n_heads={n_heads}: each head works on"
            " an equal part of the latent state."
        )


class LatentAttention(nn.Module):
    """Multi-head attention from one latent state to the tokens of its text.

    The parameters and the function of `torch.nn.MultiheadAttention`, rearranged for a single
    query: a head's score ``q·(K c)`` is ``(Kᵀ q)·c`` and its value ``Σ p (V c + v)`` is
    ``V (Σ p c) + v``, so keys and values are never formed for each token.

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
        for linear in (self.query, self.key, self.value, self.output):
            nn.init.zeros_(linear.bias)
        # The range that nn.MultiheadAttention gives its (3 * latent_size, latent_size) matrix.
        for linear in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(linear.weight, gain=math.sqrt(0.5))

    def forward(self, latent: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """What each latent state gathers from the real tokens of its text."""
        n_texts, latent_size = latent.shape
        head_shape = (self.n_heads, latent_size // self.n_heads, latent_size)

        query = self.query(latent).view(n_texts, *head_shape[:2])  # (B, nh, hs)
        query = query / math.sqrt(head_shape[1])
        # The key's bias adds the same to a query's score for every token: softmax drops it.
        query = torch.einsum("bhs,hsd->bhd", query, self.key.weight.view(head_shape))  # (B, nh, d)
        scores = query @ context.transpose(1, 2)  # (B, nh, S)
        scores = scores.masked_fill(~mask[:, None, :], -math.inf)
        attended = scores.softmax(dim=-1) @ context  # (B, nh, d)
        attended = torch.einsum("bhd,hsd->bhs", attended, self.value.weight.view(head_shape))
        return self.output(attended.flatten(1) + self.value.bias)  # (B, d)


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

    def forward(self, latent: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """The latent state, refined once."""
        latent = self.attention_norm(latent + self.attention(latent, context, mask))  # (B, d)
        return self.mlp_norm(latent + self.mlp(latent))  # (B, d)


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

    References
    ----------
    Su and Lease, "RELISH: REgression with a Latent Iterative State Head", arXiv 2604.01206.

    Examples
    --------
    >>> import torch
    >>> from sklearn_relish.head import RelishHead
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
        """
        states = states.to(self.projection.weight.dtype)  # (B, S, D)
        if self.state_norm == "rms":
            states = rms_norm(states, states.shape[-1:], eps=RMS_EPSILON)
        context = self.projection(states)  # (B, S, d)
        # A weight of zero does not silence a padding that holds NaN; a zero does.
        context = context.masked_fill(~mask[:, :, None], 0.0)
        latent = self.latent.expand(len(states), -1)  # (B, d)
        for iteration in range(self.n_iterations):
            latent = self.blocks[iteration % len(self.blocks)](latent, context, mask)  # (B, d)
        return self.readout(latent)  # (B, n_outputs)
