"""Folders as transformers saves them: small models with tokenizers of the kinds in use."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers import decoders as decoding
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind.",
    "def f(x):\n    return x + 1  # Zwölf Boxkämpfer\n",
    "A cat sat on the mat; the mat was flat. 日本語",
]
WIDE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 96,
}

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def llama3(folder: Path) -> Path:
    """Write a Llama-3-style folder: byte-level, BOS before every text, two ids that end one."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    inner = _byte_level(special)
    inner.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{special[0]} $A",
                pair=f"{special[0]} $A {special[0]} $B",
                special_tokens=[(special[0], inner.token_to_id(special[0]))],
            ),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=special[0], eos_token=special[1]
    )
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    ends = [inner.token_to_id(token) for token in special[1:]]
    _save(folder, LlamaConfig(**WIDE, vocab_size=384), tokenizer, ends)
    return folder


def llama2(folder: Path) -> Path:
    """Write a Llama-2-style folder: SentencePiece's BPE with byte fallback, BOS before a text."""
    inner: Any = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    latin = [text.encode("ascii", "ignore").decode() for text in TEXT]  # the rest falls back
    inner.train_from_iterator(latin * 3, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learnt = json.loads(inner.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted(learnt["vocab"], key=learnt["vocab"].get)
    tokenizer = LlamaTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[tuple(merge) for merge in learnt["merges"]],
        add_bos_token=True,
    )
    _save(folder, LlamaConfig(**WIDE, vocab_size=400), tokenizer, 2)
    return folder


def qwen(folder: Path) -> Path:
    """Write a Qwen-style folder: byte-level, nothing before a text, no BOS at all."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    inner = _byte_level(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=special[0], pad_token=special[0]
    )
    ends = [inner.token_to_id(special[2]), inner.token_to_id(special[0])]
    _save(folder, Qwen3Config(**WIDE, vocab_size=384, head_dim=16), tokenizer, ends)
    return folder


def chat_folder(folder: Path, template: str | None = CHATML) -> Path:
    """Write a Qwen-style folder with a chat template, ChatML by default, or None."""
    qwen(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"eos_token": "<|im_end|>"}
    file.write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def _byte_level(special: list[str]) -> Any:
    inner: Any = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoding.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(TEXT * 3, trainer)
    return inner


def _save(folder: Path, config: Any, tokenizer: Any, ends: int | list[int]) -> None:
    torch.manual_seed(1)
    config.num_key_value_heads = 1
    config.eos_token_id = ends
    config.bos_token_id = tokenizer.bos_token_id
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.generation_config = GenerationConfig(
        eos_token_id=ends, bos_token_id=tokenizer.bos_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def t5(folder: Path, *, flan: bool) -> Path:
    """Write a T5-style folder, or one of FLAN-T5: gated, with a head of its own, unscaled."""
    special = ["<pad>", "</s>"]
    inner = _byte_level(special)
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", inner.token_to_id("</s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>")
    torch.manual_seed(1)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=384,
            d_model=32,
            d_kv=12,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=3,
            num_heads=2,
            feed_forward_proj="gated-gelu" if flan else "relu",
            tie_word_embeddings=not flan,
            decoder_start_token_id=0,
            eos_token_id=inner.token_to_id("</s>"),
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    if flan:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(384, 32))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def causal(folder: Path, config: Any) -> Path:
    """Write a folder of a decoder by its config, with a byte-level tokenizer of 340 pieces."""
    inner = _byte_level(["<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")
    torch.manual_seed(1)
    config.eos_token_id = inner.token_to_id("<|endoftext|>")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
