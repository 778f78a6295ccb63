"""Tiny random models on disk, as Hugging Face folders: real architectures, no download."""

import os
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

# Nothing here is large enough to share out, and torch's idle threads spin: on busy cores that
# made the tests ten times slower.
torch.set_num_threads(1)

HIDDEN = 32
LETTERS = "abcdefgh"  # " a" to " h" are one token each, so they can serve as label words
BOS, EOS, PAD, START, END = "<s>", "</s>", "<pad>", "<|start|>", "<|end|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)

_COMMON = {"hidden_size": HIDDEN, "num_attention_heads": 4, "max_position_embeddings": 256}
_LLAMA_LIKE = {**_COMMON, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**_LLAMA_LIKE, "tie_word_embeddings": False}),
    "mistral": ("MistralConfig", {**_LLAMA_LIKE, "sliding_window": 8}),
    "gemma2": ("Gemma2Config", {**_LLAMA_LIKE, "sliding_window": 8}),
    "phi3": ("Phi3Config", {**_COMMON, "intermediate_size": 64, "num_key_value_heads": 2}),
    "gpt2": (
        "GPT2Config",
        {"n_embd": HIDDEN, "n_head": 4, "n_positions": 256, "attn_pdrop": 0.1, "resid_pdrop": 0.1},
    ),
    "gpt_neox": ("GPTNeoXConfig", {**_COMMON, "intermediate_size": 64, "hidden_dropout": 0.1}),
}
FAMILIES = tuple(_FAMILIES)

# What not every test need see: linear layers of an own class; files that are converted as they are
# read, for their experts; kernels of an own; layers that give lists.
_ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon": ("FalconConfig", {"hidden_size": HIDDEN, "num_attention_heads": 4}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_COMMON,
            "num_key_value_heads": 4,
            "intermediate_size": 64,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "openai-gpt": ("OpenAIGPTConfig", {"n_embd": HIDDEN, "n_head": 4, "n_positions": 256}),
    "mamba": ("MambaConfig", {"hidden_size": HIDDEN, "state_size": 4, "time_step_rank": 8}),
}


@cache
def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """A byte-level tokenizer of 269 tokens that puts ``<s>`` before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = [PAD, BOS, EOS, START, END]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġ{letter}" for letter in LETTERS]  # Ġ is how a byte-level vocabulary writes a space
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet, *words])}
    merges = [("Ġ", letter) for letter in LETTERS]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=chat_template,
    )


def make_model(
    folder: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    layers: int = 4,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a random model with its tokenizer; a seed gives the same bytes.

    Args:
        folder: where to; made if it is not there.
        family: the architecture, one of ``FAMILIES`` or ``_ODD``.
        dtype: of the stored weights.
        layers: number of decoder layers.
        seed: of the weights; torch's own generator is left as it was.
        config: further arguments of the model's configuration class.

    Returns:
        ``folder``.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    name, arguments = {**_FAMILIES, **_ODD}[family]
    settings = getattr(transformers, name)(
        **{
            "vocab_size": len(tokenizer),
            "num_hidden_layers": layers,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **arguments,
            **config,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
