"""Weights in few bits as folders of compressed-tensors, which transformers reads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.contract import logits
from models.decoder_config import DecoderConfig
from models.pretrained import save_pretrained
from models.scheme import parse_scheme
from models.stored_linear import compress, stored_layers

# Rows of values and keys differ, so that a matrix that joins them is split at the right ones.
MODEL = DecoderConfig(depth=1, width=64, num_heads=4, num_kv_heads=2, hidden=96)
# The largest error of logits, relative to their norm: none but fp32's where only weights are in few
# bits; scales of tokens differ by how codes are centred (127 or 127.5).
IN_FP32 = {
    "int8": 1e-6,
    "int4-g32": 1e-6,
    "int3-g32": 1e-6,
    "gptq-int5": 1e-6,
    "ternary": 1e-6,
    "fp8": 1e-6,
    "int8-dynamic": 0.02,
    "fp8-dynamic": 0.05,
}
# The largest error of a weight: NVFP4's scale of the tensor is rounded to bf16 with it.
IN_BF16 = {"mxfp4": 0, "mxfp4-dynamic": 0, "mxfp8": 0, "mxfp8-dynamic": 0, "nvfp4": 2**-8}


def _read(folder: Path, tokens: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Return the model that transformers reads, and its logits, after which weights are in full."""
    pytest.importorskip(
        "compressed_tensors", reason="transformers reads it by that: pip install compressed-tensors"
    )
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model, model(tokens).logits


@pytest.mark.parametrize("name", list(IN_FP32))
def test_transformers_reads_few_bits_back_to_the_same_logits(name: str, tmp_path: Path) -> None:
    scheme, tokens = parse_scheme(name), torch.arange(24).view(2, 12)
    model = MODEL.build(64, 0)
    with torch.no_grad():
        compress(model, scheme, (lambda: model(tokens)) if scheme.needs_data else None)
        ours = logits(model, tokens)
    save_pretrained(model, tmp_path)
    read = _read(tmp_path, tokens)[1]
    assert float((read - ours).norm() / ours.norm()) < IN_FP32[name]


@pytest.mark.parametrize("name", list(IN_BF16))
def test_formats_of_blocks_are_read_back_in_bf16(name: str, tmp_path: Path) -> None:
    model = MODEL.build(64, 0)
    compress(model, parse_scheme(name))
    with pytest.raises(ValueError, match="in bf16 alone: --dtype bf16"):
        save_pretrained(model, tmp_path / "new")
    save_pretrained(model, tmp_path, dtype=torch.bfloat16)
    theirs, scores = _read(tmp_path, torch.arange(12)[None])
    assert bool(scores.isfinite().all())
    ours = stored_layers(model)["layers.0.mlp.down"].full_weight()
    read = theirs.model.layers[0].mlp.down_proj.weight.float()
    torch.testing.assert_close(read, ours, rtol=IN_BF16[name], atol=0)


def test_a_folder_of_few_bits_has_their_size(tmp_path: Path) -> None:
    model = MODEL.build(64, 0)
    compress(model, parse_scheme("int4-g32"))
    save_pretrained(model, tmp_path, dtype=torch.bfloat16)
    state = load_file(tmp_path / "model.safetensors")
    up = state["model.layers.0.mlp.up_proj.weight_packed"]
    assert (up.dtype, up.shape) == (torch.int32, (96, 8))  # eight codes a word
    assert state["model.layers.0.self_attn.k_proj.weight_shape"].tolist() == [32, 64]
    assert state["model.layers.0.mlp.down_proj.weight_scale"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 32


@pytest.mark.parametrize(
    ("model", "scheme", "why"),
    [
        (MODEL, "nf4", "has no format of nf4"),
        (MODEL, "hqq-int4-g32", "its zero points are integers, these are not"),
        (MODEL, "awq-int4-g32", "has no place for the factors of the inputs"),
        (MODEL, "int4-g48", "layers.0.attn.qkv has 64 columns, no multiple of 48"),
        (DecoderConfig(depth=1, width=64, num_heads=4, softcap=30.0), "int8", "no form of layout"),
    ],
)
def test_what_compressed_tensors_cannot_hold_is_refused_with_the_way_out(
    model: DecoderConfig, scheme: str, why: str, tmp_path: Path
) -> None:
    built = model.build(64, 0)
    compress(built, parse_scheme(scheme))
    with pytest.raises(ValueError, match=f"{why}.*; export it in full, --to hf"):
        save_pretrained(built, tmp_path / "new")
    assert not (tmp_path / "new").exists()
