"""Writes a checkpoint of the demo network as a GGUF file of the "qwen3moe" architecture.

    python models/demo/export.py --run DIR --out models/demo/stories-moe.gguf

Owns the names, the metadata and the chat template of the file, and reads it back for training.
Needs PyTorch, tokenizers and gguf. Matrices are Q8_0 (or F32 with --type f32), norms and routers
F32; the output matrix is the embedding, so it is not stored twice.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
import torch
from moe import Config, StoryNet
from tokenizers import Tokenizer
from tokens import ASSISTANT, END, USER, make_tokenizer

__all__ = ["CHAT_TEMPLATE", "load_gguf", "load_run", "write"]

# A system message is left out: the network has never seen one. A turn of the model ends with the
# token that also parts the stories, so a dialogue reads like the rows trained on.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] | trim }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] | trim }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_BLOCK = {
    "attn_norm.weight": "attn_norm",
    "attn.q.weight": "attn_q",
    "attn.k.weight": "attn_k",
    "attn.v.weight": "attn_v",
    "attn.o.weight": "attn_output",
    "attn.q_norm.weight": "attn_q_norm",
    "attn.k_norm.weight": "attn_k_norm",
    "ffn_norm.weight": "ffn_norm",
    "experts.router.weight": "ffn_gate_inp",
    "experts.gate": "ffn_gate_exps",
    "experts.up": "ffn_up_exps",
    "experts.down": "ffn_down_exps",
}


def _names(layers: int) -> dict[str, str]:
    """Return {the network's name: the file's name} of all weights."""
    names = {"embed.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
    for i in range(layers):
        names |= {f"blocks.{i}.{k}": f"blk.{i}.{v}.weight" for k, v in _BLOCK.items()}
    return names


def load_gguf(path: Path) -> tuple[dict[str, torch.Tensor], Tokenizer]:
    """Return (float32 weights, tokenizer) of a file that `write` made, to train it further."""
    reader = gguf.GGUFReader(path)
    layers = reader.fields["qwen3moe.block_count"].contents()
    tensors = {t.name: t for t in reader.tensors}
    weights = {
        ours: torch.from_numpy(
            gguf.quants.dequantize(tensors[theirs].data, tensors[theirs].tensor_type).copy()
        )
        for ours, theirs in _names(layers).items()
    }
    tokens, merges = (
        reader.fields[f"tokenizer.ggml.{part}"].contents() for part in ("tokens", "merges")
    )
    return weights, make_tokenizer(tokens, [tuple(m.split(" ")) for m in merges])


def load_run(run: Path, checkpoint: str = "best.pt") -> tuple[StoryNet, Tokenizer, dict]:
    """Return (network, tokenizer, checkpoint's other contents) of a training folder."""
    saved = torch.load(run / checkpoint, map_location="cpu", weights_only=True)
    net = StoryNet(Config(**saved["config"]))
    net.load_state_dict(saved["weights"])
    return net.eval(), Tokenizer.from_file(str(run / "tokenizer.json")), saved


def _metadata(writer: gguf.GGUFWriter, c: Config, file_type: int) -> None:
    writer.add_name("edgert stories MoE")
    writer.add_author("edgert")
    writer.add_license("apache-2.0")
    writer.add_description(
        "A small mixture-of-experts story teller, trained from scratch on TinyStories "
        "(CDLA-Sharing-1.0) for edgert."
    )
    writer.add_languages(["en"])
    # A small model goes round in circles without a penalty; 1.15 also drove out the things asked
    # for: "a dog and a red ball" had all three words in 16 stories of 30, at 1.07 in 20.
    writer.add_float32("general.sampling.temp", 0.7)
    writer.add_float32("general.sampling.top_p", 0.9)
    writer.add_float32("general.sampling.penalty_repeat", 1.07)
    writer.add_file_type(file_type)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.moe_intermediate_size * c.num_experts_per_tok)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_expert_count(c.num_experts)
    writer.add_expert_used_count(c.num_experts_per_tok)
    writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    writer.add_vocab_size(c.vocab_size)


def _vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    control = {END, USER, ASSISTANT}
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if t in control else gguf.TokenType.NORMAL for t in tokens]
    )
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    end = tokenizer.token_to_id(END)
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def write(net: StoryNet, tokenizer: Tokenizer, out: Path, kind: str) -> int:
    """Write `net` to `out` with matrices of type `kind` ("q8_0" or "f32"); return its bytes."""
    writer = gguf.GGUFWriter(out, "qwen3moe")
    q8 = kind == "q8_0"
    file_type = gguf.LlamaFileType.MOSTLY_Q8_0 if q8 else gguf.LlamaFileType.ALL_F32
    _metadata(writer, net.config, int(file_type))
    _vocabulary(writer, tokenizer)
    names = _names(net.config.num_hidden_layers)
    for name, parameter in net.state_dict().items():
        array = parameter.detach().float().numpy().astype(np.float32)
        if q8 and array.ndim >= 2 and "router" not in name:
            packed = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(names[name], packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(names[name], array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out.stat().st_size


def main() -> None:
    """Export as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder that train.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="the GGUF file to write")
    parser.add_argument("--type", choices=("q8_0", "f32"), default="q8_0")
    args = parser.parse_args()
    net, tokenizer, saved = load_run(args.run)
    size = write(net, tokenizer, args.out, args.type)
    print(f"{args.out}: {size} bytes, {saved['state']}")


if __name__ == "__main__":
    main()
