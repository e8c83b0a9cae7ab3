"""Tiny models with random weights, for shapes and contracts: they know no language."""

import tempfile
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

N_LAYERS = 3
SIZE = 32
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@cache
def tiny_model(kind: str = "llama", size: int = SIZE, n_layers: int = N_LAYERS) -> Path:
    """Folder of a tiny model that reads bytes, made once a process."""
    folder = Path(tempfile.mkdtemp(prefix=f"tiny-{kind}-"))
    tokenizer = byte_tokenizer(kind)
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build(kind, len(tokenizer), size, n_layers).save_pretrained(folder)
    return folder


def byte_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = list(SPECIAL.values())
    if kind == "bert":
        special += ["<pad>"]
    vocab = {token: i for i, token in enumerate(special + letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "bert":  # special tokens on both sides, and a padding token
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[(t, vocab[t]) for t in SPECIAL.values()]
        )
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", **SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def build(
    kind: str, vocab_size: int, size: int = SIZE, n_layers: int = N_LAYERS
) -> torch.nn.Module:
    sizes = {"vocab_size": vocab_size, "hidden_size": size, "num_hidden_layers": n_layers}
    heads = {"num_attention_heads": 4, "intermediate_size": 64}
    if kind == "llama":
        config = LlamaConfig(**sizes, **heads, max_position_embeddings=4096, initializer_range=0.2)
        return LlamaForCausalLM(config)
    if kind == "bert":
        return BertModel(BertConfig(**sizes, **heads, max_position_embeddings=64, pad_token_id=2))
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=vocab_size, n_embd=SIZE, n_layer=N_LAYERS, n_head=4)
        )
    if kind == "t5":
        config = T5Config(
            vocab_size=vocab_size, d_model=SIZE, d_ff=64, d_kv=8, num_layers=N_LAYERS, num_heads=4
        )
        return T5ForConditionalGeneration(config)
    raise ValueError(kind)
