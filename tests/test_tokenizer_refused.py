"""Vocabularies and inputs that a tokenizer refuses, each with a message that says what is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_vocab

from edgert.errors import InputError, TokenizerError, UnsupportedError
from edgert.pretokenizers import PRETOKENIZERS
from edgert.tokenizer import Tokenizer

SPM = tiny_vocab.spm_metadata()
BPE = tiny_vocab.bpe_metadata()


def test_unknown_families_are_refused_by_name() -> None:
    with pytest.raises(
        UnsupportedError, match="tokenizer.ggml.model is 'bert'; supported: 'llama'"
    ):
        Tokenizer.from_manifest(SPM | {"tokenizer.ggml.model": "bert"})
    with pytest.raises(UnsupportedError, match="unknown pre-tokenizer 'klingon'.*qwen2"):
        Tokenizer.from_manifest(tiny_vocab.bpe_metadata(pre="klingon"))
    with pytest.raises(UnsupportedError, match="names no pre-tokenizer"):
        Tokenizer.from_manifest({k: v for k, v in BPE.items() if not k.endswith(".pre")})
    assert "tekken" in PRETOKENIZERS


def _without(metadata: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in metadata.items() if k != f"tokenizer.ggml.{key}"}


SPM_TOKENS = SPM["tokenizer.ggml.tokens"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "no tokenizer.ggml.model"),
        (_without(SPM, "tokens"), "no tokenizer.ggml.tokens"),
        (tiny_vocab.spm_metadata(tokens=[]), "no tokenizer.ggml.tokens"),
        (tiny_vocab.spm_metadata(tokens=np.arange(9)), "not a list of texts"),
        (_without(SPM, "scores"), "no tokenizer.ggml.scores"),
        (tiny_vocab.spm_metadata(scores=np.zeros(7, np.float32)), "scores has 7 entries for 410"),
        (tiny_vocab.spm_metadata(scores=np.full(410, np.nan)), "score of token 0 is not a number"),
        (tiny_vocab.spm_metadata(token_type=np.zeros(3, np.int32)), "token_type has 3 entries"),
        (tiny_vocab.spm_metadata(token_type=np.full(410, 9)), "token 0 has the unknown type 9"),
        (tiny_vocab.spm_metadata(token_type="x"), "not a list of numbers"),
        (tiny_vocab.spm_metadata(bos_token_id=410), "bos_token_id is 410, .* 410 tokens"),
        (tiny_vocab.spm_metadata(eos_token_id=-5), "eos_token_id is -5"),
        (tiny_vocab.spm_metadata(eot_token_id="x"), "eot_token_id is 'x'"),
        (tiny_vocab.spm_metadata(add_bos_token="yes"), "add_bos_token is 'yes'"),
        (
            tiny_vocab.spm_metadata(tokens=[*SPM_TOKENS[:-1], SPM_TOKENS[300]]),
            "tokens 300 and 409 both have the text",
        ),
        (
            tiny_vocab.spm_metadata(tokens=[*SPM_TOKENS[:3], "<0xZZ>", *SPM_TOKENS[4:]]),
            "token 3 is a byte token but its text is '<0xZZ>'",
        ),
        (_without(BPE, "merges"), "needs tokenizer.ggml.merges"),
        (tiny_vocab.bpe_metadata(merges=["a b", "q zz"]), "merge [01] of 2 .* names the token"),
        (tiny_vocab.bpe_metadata(merges=["ab"]), "merge 0 of 1 .'ab'. is not two tokens"),
        (tiny_vocab.bpe_metadata(add_bos_token=True), "asks for a BOS token"),
        (SPM | {"tokenizer.chat_template": 3}, "chat_template is not a text"),
    ],
)
def test_inconsistent_metadata_is_refused(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_manifest(metadata)


def test_a_vocabulary_without_bytes_needs_an_unknown_token() -> None:
    types = np.where(SPM["tokenizer.ggml.token_type"] == 6, 1, SPM["tokenizer.ggml.token_type"])
    metadata = tiny_vocab.spm_metadata(token_type=types)
    tokenizer = Tokenizer.from_manifest(metadata)
    ids = tokenizer.encode("xyza", add_bos=False)
    assert ids.count(0) == 1 and tokenizer.decode(ids).count("\ufffd") == 1
    with pytest.raises(TokenizerError, match="0 of 256 byte tokens and no unknown token"):
        Tokenizer.from_manifest(metadata | {"tokenizer.ggml.unknown_token_id": 2**32 - 1})


@pytest.mark.parametrize("metadata", [SPM, BPE], ids=["spm", "bpe"])
def test_bad_input_is_refused(metadata: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_manifest(metadata)
    with pytest.raises(InputError, match=r"character 2 .* lone surrogate U\+D800"):
        tokenizer.encode("ab\ud800")
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(InputError, match=f"token {token} is outside the vocabulary"):
            tokenizer.decode([token])
        with pytest.raises(InputError, match="outside the vocabulary"):
            tokenizer.stream_decoder().push(token)
