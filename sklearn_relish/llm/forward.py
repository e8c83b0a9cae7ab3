"""The forward pass: batches of token ids through the network, up to the deepest layer asked for.

Weights never change, no gradient is kept, and no layer above the deepest one is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sklearn_relish.llm.batch_invariance import JOINT_TOKENS, BatchInvariant
from sklearn_relish.llm.batching import Batch, Packing, make_batch, pack
from sklearn_relish.llm.layers import NotLoadedError, text_layers
from sklearn_relish.llm.prefix_attention import (
    NotCausalError,
    Prefix,
    PrefixCache,
    RecordKeys,
    RecordMasks,
    pack_after_prefix,
)
from sklearn_relish.llm.tokenize import TextTokenizer
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.utils.locks import FairLock, renew_in_forked_child

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MASK_STEP = 512  # masks are made for a multiple of this number of tokens
# Scaled rotary positions that depend on the longest text of a pass: a prefix has no fixed keys.
LENGTH_DEPENDENT = {"dynamic", "longrope"}


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

    def run(
        self, tokens: list[np.ndarray], layers: Sequence[int], prefix: Prefix | None = None
    ) -> list[TokenStates]:
        """States of a batch of tokenized texts at each of `layers`, on the CPU.

        Parameters
        ----------
        tokens : list of int64 arrays
        layers : sequence of int
            Each from 1 to the number of layers.
        prefix : Prefix, default=None
            Tokens that each text comes after.

        Raises
        ------
        FloatingPointError
            If states are not finite.
        torch.OutOfMemoryError
            If the batch does not fit into the memory of a CUDA device.
        """
        if prefix is not None:
            cache = self.prefix_cache(prefix, layers, max(map(len, tokens)))
            if cache is not None:
                return self._run_after_prefix(tokens, layers, cache)
            tokens = [prefix.before(ids) for ids in tokens]
        batch = make_batch(
            tokens,
            self.tokenizer,
            kind=self.kind,
            packing=self.packing(max(layers)) if len(tokens) > 1 else None,
        )
        values, lengths = self._run_batch(batch, layers), batch.lengths
        if prefix is not None:
            rows = prefix.rows_of_texts(lengths)
            values, lengths = [states[rows] for states in values], lengths - prefix.n_tokens
        return [TokenStates.from_lengths(states, lengths) for states in values]

    def _run_after_prefix(
        self, tokens: list[np.ndarray], layers: Sequence[int], cache: PrefixCache
    ) -> list[TokenStates]:
        """As `run`, with the keys and values of the prefix."""
        batch = pack_after_prefix(
            [ids[cache.n_special :] for ids in tokens], cache, self.tokenizer.filler_id
        )
        values = []
        for layer, states in zip(layers, self._run_batch(batch, layers), strict=True):
            special = cache.special_states[layer]
            if len(special):
                texts = states.split(batch.lengths.tolist())
                states = torch.cat([part for text in texts for part in (special, text)])
            values.append(states)
        lengths = batch.lengths + cache.n_special
        return [TokenStates.from_lengths(states, lengths) for states in values]

    def _run_batch(self, batch: Batch, layers: Sequence[int]) -> list[Tensor]:
        """States (n_tokens, D) of the texts' tokens at each of `layers`, on the CPU."""
        values = []
        with self.lock, torch.inference_mode(), batch.context:
            device = self.network.device
            inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
            outputs = self.states_at(layers, **inputs)
            for layer, output in zip(layers, outputs, strict=True):
                states = batch.real_states(output)
                if not states.isfinite().all():
                    raise FloatingPointError(self._not_finite(layer))
                values.append(states.cpu())
        return values

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
        texts = self._probe_texts(self.tokenizer.token_limit(JOINT_TOKENS + 6))
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

    def _probe_texts(self, longest: int) -> list[np.ndarray]:
        """Random tokens of texts that test whether a text's states depend on its batch."""
        generator = np.random.default_rng(0)
        return [
            generator.integers(self.config.vocab_size, size=min(length, longest))
            for length in (longest, 33, 33, 9, 9, 9, 3)
        ]

    def prefix_cache(
        self, prefix: Prefix, layers: Sequence[int], longest: int
    ) -> PrefixCache | None:
        """What a prefix contributes to texts of up to `longest` tokens; it is read once.

        None if each text is read together with the prefix: on devices other than the CPU, and with
        a model that packs no texts, in which a token attends to later ones, or whose rotary
        positions depend on the longest text.
        """
        n_threads = torch.get_num_threads()
        if self.packing(max(layers)) is None or n_threads in prefix.not_cached:
            return None
        if rope_types(self.config) & LENGTH_DEPENDENT:
            return None
        cache = prefix.caches.get(n_threads)
        known = set() if cache is None else set(cache.special_states)
        try:
            if cache is None or not known.issuperset(layers):
                cache = self._read_prefix(prefix, sorted(known.union(layers)))
            needed = cache.n_tokens + max(1, longest - cache.n_special)
            if cache.max_length < needed:
                cache = self._with_masks(cache, needed)
        except NotLoadedError:
            raise
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            prefix.not_cached.add(n_threads)  # not causal, or it does not take these inputs
            return None
        prefix.caches[n_threads] = cache
        return cache

    def _read_prefix(self, prefix: Prefix, layers: list[int]) -> PrefixCache:
        """Read the prefix alone, up to the deepest of `layers`."""
        batch = pack([prefix.ids], "separate", self.tokenizer.filler_id)
        recorder = RecordKeys(len(prefix.ids), batch.inputs["input_ids"].shape[1])
        states = self._run_batch(replace(batch, context=recorder), layers)
        special_states = {
            layer: values[: prefix.n_special].clone()
            for layer, values in zip(layers, states, strict=True)
        }
        cache = PrefixCache(recorder.keys, recorder.values, prefix.n_special, special_states)
        if not self._packs_after(cache, layers[-1]):
            raise NotCausalError
        return cache

    def _packs_after(self, cache: PrefixCache, layer: int) -> bool:
        """Whether packed texts have the same bits at a layer after a prefix as each has alone."""
        room = self.tokenizer.token_limit(cache.n_tokens + JOINT_TOKENS + 6) - cache.n_tokens
        texts = self._probe_texts(room)
        cache = self._with_masks(cache, cache.n_tokens + len(texts[0]))

        def outputs(tokens: list[np.ndarray]) -> Tensor:
            batch = pack_after_prefix(tokens, cache, self.tokenizer.filler_id)
            with self.lock, torch.inference_mode(), batch.context:
                return batch.real_states(self.states_at([layer], **batch.inputs)[0])

        return torch.equal(outputs(texts), torch.cat([outputs([ids]) for ids in texts]))

    def _with_masks(self, cache: PrefixCache, length: int) -> PrefixCache:
        """The cache with masks of at least `length` tokens, the prefix included."""
        length = -(-length // MASK_STEP) * MASK_STEP
        limit = self.tokenizer.context_length
        if limit is not None and limit > 0:
            length = min(length, limit)
        batch = pack([np.full(length, self.tokenizer.filler_id)], "separate", 0)
        with self.lock, torch.inference_mode(), RecordMasks() as recorder:
            self.states_at([max(cache.special_states)], **batch.inputs)
        return replace(cache, masks=recorder.masks, max_length=length)

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


def rope_types(config: PretrainedConfig) -> set[str]:
    """How a model's rotary positions are scaled; a model may have several ways."""
    scaling = (
        getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    )
    parts = [scaling, *(part for part in scaling.values() if isinstance(part, dict))]
    return {str(part.get("rope_type", part.get("type"))) for part in parts}


class _DeepestLayerReached(Exception):  # noqa: N818, it is no error
    """Ends a forward pass early."""
