"""`edgert show`: what is in a model file, from its header alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import edgert
from edgert import InputError, format_bytes
from edgert.cli.options import ModelOptions, debug_options, json_option, model_argument
from edgert.cli.progress import Progress
from edgert.cli.report import print_json, table

if TYPE_CHECKING:
    from edgert import Manifest

__all__ = ["describe", "facts_text", "show"]

_LENGTHS = {  # our word -> the metadata key after the architecture's name
    "context_length": "context_length",
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
}


@click.command()
@model_argument
@click.option("--verify", is_flag=True, help="Read an .edgert file and compare its checksums.")
@json_option
@debug_options
def show(model: Path | None, verify: bool, as_json: bool) -> None:
    """Show what is in a model file: architecture, sizes, tokenizer, licence.

    Only the header is read, so this works for files edgert cannot run.
    """
    path = ModelOptions(model).path
    facts = describe(edgert.read_manifest(path))
    if verify:
        _verify(path)
        facts["verified"] = True
    if as_json:
        print_json(facts)
        return
    click.echo(facts_text(facts))


def _verify(path: Path) -> None:
    """Raises `FormatError` for a file that is not as it was written."""
    with open(path, "rb") as file:
        if file.read(4) == b"GGUF":
            raise InputError(f"{path} is a GGUF, which has no checksums; edgert pack adds them")
    with Progress() as progress:
        edgert.verify_pack(path, lambda done, total: progress.update(done, total, "verify"))


def describe(manifest: Manifest) -> dict[str, Any]:
    """The facts of a model file as JSON values; keys without a value in the file are None."""
    metadata = manifest.metadata
    architecture = metadata.get("general.architecture")
    formats: dict[str, dict[str, int]] = {}
    for tensor in manifest.tensors.values():
        each = tensor.parameters // max(len(tensor.matrices), 1)
        pieces = [(fmt, each, extent.nbytes) for fmt, extent in tensor.matrices]
        for fmt in tensor.formats:
            formats.setdefault(fmt.name, dict.fromkeys(("tensors", "parameters", "nbytes"), 0))
            formats[fmt.name]["tensors"] += 1
        for fmt, parameters, nbytes in pieces or [(tensor.format, each, tensor.nbytes)]:
            formats[fmt.name]["parameters"] += parameters
            formats[fmt.name]["nbytes"] += nbytes
    tokens = metadata.get("tokenizer.ggml.tokens")
    return {
        "files": [str(path) for path in manifest.files],
        "file_bytes": sum(manifest.file_bytes),
        "name": metadata.get("general.name"),
        "architecture": architecture,
        "parameters": sum(entry["parameters"] for entry in formats.values()),
        "tensors": len(manifest.tensors),
        "tensor_bytes": manifest.tensor_bytes,
        **{word: metadata.get(f"{architecture}.{key}") for word, key in _LENGTHS.items()},
        "vocab_size": None if tokens is None else len(tokens),
        "tokenizer": metadata.get("tokenizer.ggml.model"),
        "tokenizer_pre": metadata.get("tokenizer.ggml.pre"),
        "chat_template": "tokenizer.chat_template" in metadata,
        "licence": metadata.get("general.license"),
        "author": metadata.get("general.author"),
        "source": metadata.get("general.source.url") or metadata.get("general.url"),
        "formats": formats,
    }


def facts_text(facts: dict[str, Any]) -> str:
    """`describe`'s facts for people: a line for each, then the sizes by number format."""
    lines = [(key.replace("_", " "), _text(key, facts[key])) for key in facts if key != "formats"]
    width = max(len(key) for key, _ in lines)
    sizes = [
        (name, str(f["tensors"]), f"{f['parameters']:,}", format_bytes(f["nbytes"]))
        for name, f in facts["formats"].items()
    ]
    return "\n".join(
        [
            *(f"{key.ljust(width)}  {value}" for key, value in lines),
            "",
            table(("format", "tensors", "parameters", "size"), sizes),
        ]
    )


def _text(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("_bytes"):
        return f"{format_bytes(value)} ({value:,} bytes)"
    if isinstance(value, int):
        return f"{value:,}"
    if hasattr(value, "tolist"):  # one number for each layer
        value = value.tolist()
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return str(value)
