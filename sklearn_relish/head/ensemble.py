"""An ensemble: the mean of several heads, and a linear path on pooled states."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sklearn_relish.head.head import RelishHead, zero_padding
from sklearn_relish.head.losses import HuberLoss, Loss, make_loss
from sklearn_relish.head.pooling import pool
from sklearn_relish.utils.versions import FORMAT, check_format

LINEAR_POOLINGS = ("mean", "last", "std")  # what the linear path reads, in the order of its weights
HUBER = HuberLoss()


class RelishEnsemble(nn.Module):
    """The mean of several heads' predictions, plus a linear function of pooled states.

    A prediction is ``head_weight * mean of the heads + V [mean; last; standard deviation] + b`` if
    there is a linear path, and the mean of the heads if there is none. The linear path may read
    further vectors of a text.

    Parameters
    ----------
    heads : list of RelishHead
        With the same input size, `state_norm`, `pair`, `both_orders` and number of outputs.
    linear_path : bool
        Whether there is a linear path. It has no influence until its weights are set.
    loss_fn : Loss
        Its inverse link turns the heads' raw predictions into predictions.
    n_vectors : int, default=0
        Number of vectors of a text that the linear path reads in addition.
    n_views : int, default=1
        Number of texts of a row, such as one for each of several prompts. Each has its own linear
        path: see `of_view`. The ensemble itself predicts for the first.

    Attributes
    ----------
    n_vectors : int
        0 without a linear path.
    head_weight : Tensor of shape (n_outputs,)
        Weight of the heads' mean, 1 at first.
    linear : torch.nn.Linear or None
        From the pooled states of a text, one for each of `LINEAR_POOLINGS` and normalized like
        those of the heads, and its further vectors to its prediction. With several views, the
        outputs of each view come one after the other.

    Examples
    --------
    >>> from sklearn_relish import RelishRegressor
    >>> texts, y = ["dull", "fine", "splendid"] * 20, [1, 3, 5] * 20
    >>> regressor = RelishRegressor(random_state=0).fit(texts, y)
    >>> len(regressor.head_.heads)
    5
    """

    def __init__(
        self,
        heads: list[RelishHead],
        linear_path: bool,
        loss_fn: Loss = HUBER,
        n_vectors: int = 0,
        n_views: int = 1,
    ) -> None:
        super().__init__()
        # A ModuleList: torch does not know the type of its modules.
        self.heads = cast(Sequence[RelishHead], nn.ModuleList(heads))
        self.loss_fn = loss_fn
        self.state_norm = heads[0].state_norm
        input_size, n_outputs = heads[0].sizes["input_size"], heads[0].sizes["n_outputs"]
        ones = torch.ones(n_outputs, dtype=torch.float32)
        self.head_weight = nn.Parameter(ones, requires_grad=False)
        self.linear: nn.Linear | None = None
        self.n_vectors = n_vectors if linear_path else 0
        self.n_views = n_views
        self._of_views: dict[int, tuple[Any, RelishEnsemble]] = {}
        if linear_path:
            n_inputs = (len(LINEAR_POOLINGS) + n_vectors) * input_size
            # Made without values: initial ones would be drawn from torch's global generator.
            n_linear = n_views * n_outputs
            linear = nn.Linear(n_inputs, n_linear, device="meta", dtype=torch.float32)
            linear = linear.to_empty(device=self.head_weight.device)
            linear.requires_grad_(False)
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
            self.linear = linear

    def with_heads(self, heads: Iterable[RelishHead], loss_fn: Loss) -> RelishEnsemble:
        """An ensemble of other heads, with a copy of the linear path of this one.

        Examples
        --------
        >>> import torch
        >>> from sklearn_relish import RelishHead
        >>> from sklearn_relish.head.ensemble import RelishEnsemble
        >>> heads = [RelishHead(input_size=16, latent_size=8, n_heads=2) for _ in range(5)]
        >>> ensemble = RelishEnsemble(heads, linear_path=True)
        >>> len(ensemble.with_heads(heads[:3], ensemble.loss_fn).heads)
        3
        """
        linear_path = self.linear is not None
        ensemble = RelishEnsemble(list(heads), linear_path, loss_fn, self.n_vectors, self.n_views)
        ensemble.head_weight.copy_(self.head_weight)
        if self.linear is not None and ensemble.linear is not None:
            ensemble.linear.load_state_dict(self.linear.state_dict())
        return ensemble.eval()

    def of_view(self, view: int) -> RelishEnsemble:
        """The ensemble that predicts for one view, numbered from 0; it shares the weights.

        Examples
        --------
        >>> from sklearn_relish import RelishHead
        >>> from sklearn_relish.head.ensemble import RelishEnsemble
        >>> heads = [RelishHead(input_size=16, latent_size=8, n_heads=2) for _ in range(5)]
        >>> ensemble = RelishEnsemble(heads, linear_path=True, n_views=2)
        >>> ensemble.linear.out_features, ensemble.of_view(1).linear.out_features
        (2, 1)
        """
        if self.n_views == 1:
            return self
        weights = [self.head_weight, *([] if self.linear is None else self.linear.parameters())]
        heads_of = cast(nn.ModuleList, self.heads).parameters()
        made_for = [(id(w), w.data_ptr(), w.dtype) for w in (*heads_of, *weights)]
        kept = self._of_views.get(view)
        if kept is None or kept[0] != made_for:
            heads, n_outputs = list(self.heads), self.heads[0].sizes["n_outputs"]
            ensemble = RelishEnsemble(heads, self.linear is not None, self.loss_fn, self.n_vectors)
            ensemble.head_weight = self.head_weight
            if self.linear is not None and ensemble.linear is not None:
                rows = slice(view * n_outputs, (view + 1) * n_outputs)
                for name, weight in self.linear.named_parameters():
                    part = nn.Parameter(weight[rows], requires_grad=False)  # shares the memory
                    setattr(ensemble.linear, name, part)
            self._of_views[view] = kept = made_for, ensemble.eval()
        return kept[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> RelishEnsemble:
        """A copy as of any other module, not by way of `__getstate__`."""
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__ | {"_of_views": {}}, memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Only arrays and plain values, which can be opened without a GPU."""
        weights = {name: weight.cpu().numpy() for name, weight in self.state_dict().items()}
        return {
            "format": FORMAT,
            "sizes": self.heads[0].sizes,
            "n_heads": len(self.heads),
            "linear_path": self.linear is not None,
            "n_vectors": self.n_vectors,
            "n_views": self.n_views,
            "loss_fn": {
                "name": self.loss_fn.name,
                "quantiles": list(self.loss_fn.quantiles),
            },
            "weights": weights,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        check_format(state, f"The saved {type(self).__name__}")
        with torch.device("meta"):
            heads = [RelishHead(**state["sizes"]) for _ in range(state["n_heads"])]
            loss_fn = make_loss(**state["loss_fn"])
            type(self).__init__(
                self, heads, state["linear_path"], loss_fn, state["n_vectors"], state["n_views"]
            )
        weights = {name: torch.tensor(array) for name, array in state["weights"].items()}
        self.load_state_dict(weights, assign=True)
        self.eval()

    def forward(
        self,
        states: Tensor,
        mask: Tensor,
        matches: Tensor | None = None,
        others: Tensor | None = None,
        vectors: Tensor | None = None,
    ) -> Tensor:
        """Predict for each text of a padded batch, in standardized units; see `RelishHead`.

        `matches` is (B, S), for heads of pairs, and `others` (B, S, D), for those of pairs in both
        orders. `vectors` is (B, n, D), of which the linear path reads the first `n_vectors`.

        Examples
        --------
        >>> import torch
        >>> from sklearn_relish import RelishHead
        >>> from sklearn_relish.head.ensemble import RelishEnsemble
        >>> heads = [RelishHead(input_size=16, latent_size=8, n_heads=2) for _ in range(5)]
        >>> states, mask = torch.randn(2, 7, 16), torch.ones(2, 7, dtype=torch.bool)
        >>> RelishEnsemble(heads, linear_path=True)(states, mask).shape
        torch.Size([2, 1])
        """
        if others is not None:
            others = zero_padding(others, mask)
        states = zero_padding(states, mask)
        return self.forward_zero_padded(states, mask, matches, others, vectors)

    def forward_zero_padded(
        self,
        states: Tensor,
        mask: Tensor,
        matches: Tensor | None = None,
        others: Tensor | None = None,
        vectors: Tensor | None = None,
    ) -> Tensor:
        """The same as `forward`, without its check and copy: the padding must hold zeros.

        Examples
        --------
        >>> import torch
        >>> from sklearn_relish import RelishHead
        >>> from sklearn_relish.head.ensemble import RelishEnsemble
        >>> heads = [RelishHead(input_size=16, latent_size=8, n_heads=2) for _ in range(5)]
        >>> ensemble = RelishEnsemble(heads, linear_path=False)
        >>> states, mask = torch.randn(2, 7, 16), torch.ones(2, 7, dtype=torch.bool)
        >>> ensemble.forward_zero_padded(states, mask).shape
        torch.Size([2, 1])
        """
        states = states.to(self.head_weight.dtype)  # (B, S, D)
        others = None if others is None else others.to(states.dtype)
        raw = [head.forward_zero_padded(states, mask, matches, others) for head in self.heads]
        # (B, n_outputs) each
        return self._with_linear_path(self._mean(raw), states, mask, vectors)

    def staged(
        self,
        states: Tensor,
        mask: Tensor,
        matches: Tensor | None = None,
        others: Tensor | None = None,
        vectors: Tensor | None = None,
    ) -> Tensor:
        """The prediction after each iteration of the heads, (n_iterations, B, n_outputs).

        The padding must hold zeros.

        Examples
        --------
        >>> import torch
        >>> from sklearn_relish import RelishHead
        >>> from sklearn_relish.head.ensemble import RelishEnsemble
        >>> heads = [RelishHead(input_size=16, latent_size=8, n_heads=2) for _ in range(5)]
        >>> ensemble = RelishEnsemble(heads, linear_path=False)
        >>> states, mask = torch.randn(2, 7, 16), torch.ones(2, 7, dtype=torch.bool)
        >>> ensemble.staged(states, mask).shape
        torch.Size([3, 2, 1])
        """
        states = states.to(self.head_weight.dtype)  # (B, S, D)
        others = None if others is None else others.to(states.dtype)
        raw = [head.staged(states, mask, matches, others).unbind() for head in self.heads]
        mean = torch.stack([self._mean(stage) for stage in zip(*raw, strict=True)])
        # (n_iterations, B, n_outputs)
        return self._with_linear_path(mean, states, mask, vectors)

    def attention(
        self,
        states: Tensor,
        mask: Tensor,
        matches: Tensor | None = None,
        others: Tensor | None = None,
    ) -> Tensor:
        """Weights of the tokens, (n_estimators, n_iterations, B, n_heads, S), of sum 1.

        The padding must hold zeros.

        Examples
        --------
        >>> import torch
        >>> from sklearn_relish import RelishHead
        >>> from sklearn_relish.head.ensemble import RelishEnsemble
        >>> heads = [RelishHead(input_size=16, latent_size=8, n_heads=2) for _ in range(5)]
        >>> ensemble = RelishEnsemble(heads, linear_path=False)
        >>> states, mask = torch.randn(2, 7, 16), torch.ones(2, 7, dtype=torch.bool)
        >>> ensemble.attention(states, mask).shape
        torch.Size([5, 3, 2, 2, 7])
        """
        states = states.to(self.head_weight.dtype)  # (B, S, D)
        others = None if others is None else others.to(states.dtype)
        steps = [list(head.steps(states, mask, matches, others)) for head in self.heads]
        return torch.stack([torch.stack([step.attention for step in head]) for head in steps])

    def _mean(self, raw: Iterable[Tensor]) -> Tensor:
        """The mean of the heads' predictions, from the raw prediction of each."""
        predictions = map(self.loss_fn.inverse_link, raw)
        return cast(Tensor, sum(predictions)) / len(self.heads)  # (B, n_outputs)

    def _with_linear_path(
        self, mean: Tensor, states: Tensor, mask: Tensor, vectors: Tensor | None
    ) -> Tensor:
        """The heads' mean, (..., B, n_outputs), weighted together with the linear path."""
        if self.linear is None:
            return mean
        pooled = [pool(states, mask, pooling, self.state_norm) for pooling in LINEAR_POOLINGS]
        if self.n_vectors:
            n_given = 0 if vectors is None else vectors.shape[1]
            if vectors is None or n_given < self.n_vectors:
                raise ValueError(
                    f"The linear path reads {self.n_vectors} vectors of each text next to the"
                    f" states of its tokens, but there are {n_given}: pass them as vectors, or a"
                    " model that maps tokens to pieces of the text, as in fit."
                )
            used = vectors[:, : self.n_vectors].to(states.dtype)
            pooled.append(used.flatten(1))  # (B, n_vectors * D)
        linear = self.linear(torch.cat(pooled, dim=1))[:, : len(self.head_weight)]
        return self.head_weight * mean + linear
