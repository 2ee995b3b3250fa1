"""Exchange with transformers: logits equal in both directions, for every form of folder."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from models.decoder_config import DecoderConfig
from models.pretrained import is_shifted, load_pretrained, save_pretrained
from models.rope_config import RopeScaling

LLAMA: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 128,
}
STRETCHED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "rope_theta": 5e3,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 1e4,
}
THEIRS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**LLAMA, rms_norm_eps=1e-5),
    "llama, tied, biases, wide heads": LlamaConfig(
        **LLAMA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=16
    ),
    "llama, linear": LlamaConfig(
        **LLAMA, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    ),
    "llama, llama3": LlamaConfig(**LLAMA, rope_parameters=STRETCHED),
    "llama, yarn": LlamaConfig(**LLAMA, rope_parameters=YARN),
    "llama, yarn, mscale": LlamaConfig(
        **LLAMA,
        rope_parameters=YARN
        | {"mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False, "beta_fast": 16.0},
    ),
    "qwen2": Qwen2Config(**LLAMA),
    "qwen3": Qwen3Config(**LLAMA, head_dim=16),
    "qwen3, tied": Qwen3Config(**LLAMA, head_dim=12, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "gpt2": GPT2Config(n_embd=48, n_layer=2, n_head=4, n_positions=128, vocab_size=99),
    "gpt2, untied": GPT2Config(
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=128,
        vocab_size=99,
        tie_word_embeddings=False,
        n_inner=64,
    ),
}
TOKENS = torch.randint(0, 99, (2, 60), generator=torch.Generator().manual_seed(0))


def _theirs(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # gains and biases too, far from their start
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    out = model(TOKENS)
    return out if isinstance(out, Tensor) else out.logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", THEIRS)
def test_their_logits_are_ours_in_both_directions(name: str, tmp_path: Path) -> None:
    theirs = _theirs(THEIRS[name])
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    ours = load_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(_logits(ours), _logits(theirs), rtol=1e-4, atol=1e-4)
    assert ours.cfg.num_parameters(99) == sum(p.numel() for p in ours.parameters())
    written = save_pretrained(ours, tmp_path / "ours", max_shard_size="20KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    assert written == type(theirs).__name__
    back = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    ).eval()
    torch.testing.assert_close(_logits(back), _logits(theirs), rtol=1e-4, atol=1e-4)
    assert (
        AutoConfig.from_pretrained(tmp_path / "ours").tie_word_embeddings
        == theirs.config.tie_word_embeddings
    )


def _as_llada(name: str) -> str:
    for theirs, here in {
        "model.": "model.transformer.",
        "embed_tokens": "wte",
        "transformer.norm": "transformer.ln_f",
        "lm_head": "model.transformer.ff_out",
        "layers": "blocks",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ff_norm",
        "self_attn.o_proj": "attn_out",
        "self_attn.": "",
        "mlp.gate_proj": "ff_proj",
        "mlp.down_proj": "ff_out",
        "mlp.": "",
    }.items():
        name = name.replace(theirs, here)
    return name


LLADA = {
    "model_type": "llada",
    "d_model": 48,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "mlp_hidden_size": 80,
    "max_sequence_length": 128,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
    "vocab_size": 90,
    "embedding_size": 99,
    "weight_tying": False,
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
}


@pytest.mark.parametrize("kind", ["Dream", "llada"])
def test_folders_of_diffusion_models_are_read(kind: str, tmp_path: Path) -> None:
    """Dream's forward pass is Qwen2's and LLaDA's is Llama's, with every token seeing all."""
    theirs = _theirs(Qwen2Config(**LLAMA) if kind == "Dream" else LlamaConfig(**LLAMA))
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    keys = config | {"model_type": "Dream", "mask_token_id": 98}
    if kind == "llada":
        state, keys = load_file(tmp_path / "model.safetensors"), dict(LLADA)
        renamed = {_as_llada(name): tensor for name, tensor in state.items()}
        save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(keys))
    ours = load_pretrained(tmp_path)
    with torch.no_grad():
        everything = torch.zeros(2, 1, TOKENS.shape[1], TOKENS.shape[1])
        expected = theirs(TOKENS, attention_mask=everything).logits
    torch.testing.assert_close(_logits(ours), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, _logits(theirs), atol=0.1), "the mask matters"
    assert (ours.cfg.causal, is_shifted(tmp_path)) == (False, kind == "Dream")
    assert ours.cfg.num_parameters(99) == sum(p.numel() for p in ours.parameters())
    assert save_pretrained(ours, tmp_path / "own") == "Decoder"
    refused = {"use_mrope": True} if kind == "Dream" else {"include_bias": True}
    (tmp_path / "config.json").write_text(json.dumps(keys | refused))
    with pytest.raises(ValueError, match=f"{next(iter(refused))}=True"):
        load_pretrained(tmp_path)


def test_the_keys_of_transformers_4_and_a_checkpoint_without_prefix_are_read(
    tmp_path: Path,
) -> None:
    for name in ("llama, llama3", "gpt2"):
        folder = tmp_path / name
        theirs = _theirs(THEIRS[name])
        theirs.save_pretrained(folder)
        given = json.loads((folder / "config.json").read_text())
        rope = given.pop("rope_parameters", {})
        given |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope} if rope else {}
        (folder / "config.json").write_text(json.dumps(given))
        state = load_file(folder / "model.safetensors")
        shorn = {key.removeprefix("transformer."): value for key, value in state.items()}
        tables = {"h.0.attn.bias": torch.ones(1)} if name == "gpt2" else {}
        save_file(shorn | tables, folder / "model.safetensors", metadata={"format": "pt"})
        ours = load_pretrained(folder)
        torch.testing.assert_close(_logits(ours), _logits(theirs), rtol=1e-4, atol=1e-4)


UNKNOWN_TO_TRANSFORMERS = {
    "softcap": DecoderConfig(depth=2, width=32, num_heads=2, softcap=10.0),
    "mup": DecoderConfig(depth=2, width=64, num_heads=2, init="mup", base_width=32),
    "relu2, stretched": DecoderConfig(
        depth=1,
        width=32,
        num_heads=2,
        activation="relu2",
        rope_scaling=RopeScaling(kind="yarn", factor=2.0, original_context=64),
    ),
}


@pytest.mark.parametrize("name", UNKNOWN_TO_TRANSFORMERS)
def test_what_transformers_does_not_know_keeps_its_own_class(name: str, tmp_path: Path) -> None:
    cfg = UNKNOWN_TO_TRANSFORMERS[name]
    model = cfg.build(99, 5)
    assert save_pretrained(model, tmp_path / "m", dtype=torch.bfloat16) == "Decoder"
    back = load_pretrained(tmp_path / "m")
    assert back.cfg == cfg
    rounded = {key: value.bfloat16().float() for key, value in model.state_dict().items()}
    torch.testing.assert_close(dict(back.state_dict()), rounded, rtol=0, atol=0)
    with pytest.raises(ValueError, match="layout=llama cannot hold this model"):
        save_pretrained(model, tmp_path / "n", layout="llama")
    assert not (tmp_path / "n").exists()


def test_folders_that_cannot_be_read_or_written_say_why(tmp_path: Path) -> None:
    cfg = DecoderConfig(depth=1, width=16, num_heads=2)
    folder = tmp_path / "m"
    save_pretrained(cfg.build(9, 0), folder)
    with pytest.raises(FileExistsError, match="not empty"):
        save_pretrained(cfg.build(9, 0), folder)
    with pytest.raises(
        ValueError, match="none of: llama, qwen2, qwen3, mixtral, gpt2, Dream, llada, espalier"
    ):
        save_pretrained(cfg.build(9, 0), tmp_path / "n", layout="mistral")
    given = json.loads((folder / "config.json").read_text())
    for change, message in {
        "hidden_act": "hidden_act='relu'",
        "model_type": "model_type='relu' is not read",
        "num_hidden_layers": "lacks the tensor model.layers.1",
        "hidden_size": "wanted",
        "tie_word_embeddings": "lacks the tensor lm_head.weight",
    }.items():
        values = {"num_hidden_layers": 2, "hidden_size": 32, "tie_word_embeddings": False}
        other = {change: values.get(change, "relu")}
        (folder / "config.json").write_text(json.dumps(given | other))
        with pytest.raises(ValueError, match=message):
            load_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(given | {"num_hidden_layers": 0}))
    with pytest.raises(ValueError, match="depth=0"):
        load_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(given))
    save_pretrained(replace(cfg, depth=2).build(9, 0), tmp_path / "deep")
    (tmp_path / "deep" / "config.json").write_text(json.dumps(given))
    with pytest.raises(ValueError, match="its architecture does not have"):
        load_pretrained(tmp_path / "deep")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"m/config\.json is not JSON"):
        load_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(given))
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="transformers writes them"):
        load_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_pretrained(tmp_path)


def _untie(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    state["lm_head.weight"] = state["lm_head.weight"] + 1.0


def _drop_eps(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    del config["rms_norm_eps"]


def _drop_rope(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    del config["rope_parameters"]


def _drop_head_dim(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    config.pop("head_dim", None)


def _two_ropes(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["rope_scaling"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}


def _stale_shard(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    save_file({k: v + 1.0 for k, v in state.items()}, folder / "model-00001-of-00001.safetensors")


def _one_head_less(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["num_key_value_heads"] = config["num_attention_heads"]


def _a_row_less(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["vocab_size"] -= 1


def _sliding(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["layer_types"] = ["sliding_attention"] * config["num_hidden_layers"]


def _quantised(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["quantization_config"] = {"quant_method": "fp8"}


def _as_it_is(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    pass


@pytest.mark.parametrize("name", ["llama", "qwen3, tied", "mixtral"])
@pytest.mark.parametrize(
    ("change", "read"),
    [
        (_as_it_is, True),
        (_untie, False),
        (_drop_eps, True),
        (_drop_rope, True),
        (_drop_head_dim, True),
        (_two_ropes, True),
        (_stale_shard, True),
        (_one_head_less, False),
        (_a_row_less, False),
        (_sliding, False),
        (_quantised, False),
    ],
)
def test_a_folder_that_contradicts_its_config_is_refused_or_read_as_transformers_reads_it(
    change: Callable[..., None], read: bool, name: str, tmp_path: Path
) -> None:
    theirs = _theirs(THEIRS[name])
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    change(tmp_path, state, config)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    if not read or (change is _drop_head_dim and "qwen3" in name):  # 128 is Qwen's
        with pytest.raises(ValueError, match=str(tmp_path)):
            load_pretrained(tmp_path)
        return
    ours = load_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    torch.testing.assert_close(_logits(ours), _logits(back), rtol=1e-4, atol=1e-4)
