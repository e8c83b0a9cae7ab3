"""The forward pass: batches of token ids through the network, up to the deepest layer asked for.

Weights never change, no gradient is kept, and no layer above the deepest one is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sklearn_relish.llm.batch_invariance import JOINT_TOKENS, BatchInvariant
from sklearn_relish.llm.batching import Packing, make_batch, pack
from sklearn_relish.llm.layers import NotLoadedError, text_layers
from sklearn_relish.llm.tokenize import TextTokenizer
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.utils.locks import FairLock, renew_in_forked_child

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class ForwardPass:
    """States of token ids at layers of a network.

    Threads take turns, batch by batch.

    Parameters
    ----------
    network : PreTrainedModel
        Up to the deepest layer that is read, at least. More layers may be added while it is used.
    tokenizer : TextTokenizer
    config : PretrainedConfig
        Of the network's text layers.
    kind : {"cpu", "mps", "cuda"}
        Of the device that the network was loaded for.
    dtype : torch.dtype
        That the network computes in.
    name : str
        The model's name, for errors.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: TextTokenizer,
        config: PretrainedConfig,
        *,
        kind: str,
        dtype: torch.dtype,
        name: str,
    ) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.config = config
        self.kind = kind
        self.dtype = dtype
        self.name = name
        self._packing: dict[tuple[int, int], Packing | None] = {}  # by layer and threads
        self._renew_lock()
        renew_in_forked_child(self, ForwardPass._renew_lock)

    def _renew_lock(self) -> None:
        self.lock = FairLock()

    def run(self, tokens: list[np.ndarray], layers: Sequence[int]) -> list[TokenStates]:
        """States of a batch of tokenized texts at each of `layers`, on the CPU.

        Parameters
        ----------
        tokens : list of int64 arrays
        layers : sequence of int
            Each from 1 to the number of layers.

        Raises
        ------
        FloatingPointError
            If states are not finite.
        torch.OutOfMemoryError
            If the batch does not fit into the memory of a CUDA device.
        """
        batch = make_batch(
            tokens,
            self.tokenizer,
            kind=self.kind,
            packing=self.packing(max(layers)) if len(tokens) > 1 else None,
        )
        values = []
        with self.lock, torch.inference_mode(), batch.context:
            device = self.network.device
            inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
            outputs = self.states_at(layers, **inputs)
            for layer, output in zip(layers, outputs, strict=True):
                states = batch.real_states(output)  # (n_tokens, D)
                if not states.isfinite().all():
                    raise FloatingPointError(self._not_finite(layer))
                values.append(states.cpu())
        return [TokenStates.from_lengths(states, batch.lengths) for states in values]

    def states_at(self, layers: Sequence[int], **inputs: Tensor) -> list[Tensor]:
        """Outputs (B, S, D) of layers; that of the last layer is taken after the final norm."""
        outputs: dict[int, Tensor] = {}
        n_layers, deepest = self.config.num_hidden_layers, max(layers)

        def keep(layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs[layer] = output[0] if isinstance(output, tuple) else output
            if layer == deepest:
                raise _DeepestLayerReached

        with ExitStack() as hooks:
            for layer in set(layers) - {n_layers}:
                handle = self.layers[layer - 1].register_forward_hook(partial(keep, layer))
                hooks.callback(handle.remove)
            with suppress(_DeepestLayerReached):
                outputs[n_layers] = self.network(**inputs).last_hidden_state
        if deepest not in outputs:
            raise RuntimeError(f"The pass of {self.name} did not go through layer {deepest}.")
        return [outputs[layer] for layer in layers]

    @cached_property
    def layers(self) -> nn.ModuleList:
        """The network's layers."""
        n_layers = self.config.num_hidden_layers
        layers = text_layers(self.network, n_layers)
        if layers is not None:
            return layers
        raise ValueError(
            f"{self.name} is a {type(self.network).__name__}, whose {n_layers} layers are"
            " not one torch.nn.ModuleList: read its last layer, layer=-1."
        )

    def packing(self, layer: int) -> Packing | None:
        """How attention treats packed texts, such that each has the same bits as alone.

        None if texts must not be packed: a model with convolutions, recurrent layers, its own
        attention or without position ids would mix them. This is measured once for each layer and
        number of threads.
        """
        if self.kind != "cpu" or self.network.device.type != "cpu":
            return None
        key = layer, torch.get_num_threads()
        if key not in self._packing:
            ways: list[Packing] = ["joint", "separate"]
            if self.dtype == torch.float32:
                ways = ["separate"]
            self._packing[key] = next((way for way in ways if self._packs(way, layer)), None)
        return self._packing[key]

    def _packs(self, packing: Packing, layer: int) -> bool:
        """Whether packed texts have the same bits at a layer as each has alone."""
        generator = np.random.default_rng(0)
        longest = self.tokenizer.token_limit(JOINT_TOKENS + 6)
        texts = [
            generator.integers(self.config.vocab_size, size=min(length, longest))
            for length in (longest, 33, 33, 9, 9, 9, 3)
        ]
        with self.lock, torch.inference_mode():
            try:
                batch = pack(texts, packing, self.tokenizer.filler_id)
                with batch.context as invariant:
                    (packed,) = self.states_at([layer], **batch.inputs)
                states = []
                for ids in texts:
                    with BatchInvariant():
                        states += self.states_at([layer], input_ids=torch.from_numpy(ids)[None])
                alone = torch.cat(states, dim=1)[0]
                return invariant.n_attentions > 0 and torch.equal(packed[0, : len(alone)], alone)
            except NotLoadedError:
                raise
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
                return False  # the network does not take these inputs

    def _not_finite(self, layer: int) -> str:
        advice = (
            "the weights are damaged, or the model is broken at this layer: try another one"
            if self.dtype == torch.float32
            else "pass dtype='float32'"
        )
        return (
            f"{self.name} gives states that are not finite at layer {layer} in"
            f" {self.dtype}: {advice}."
        )


class _DeepestLayerReached(Exception):  # noqa: N818, it is no error
    """Ends a forward pass early."""
