"""Tokenizers: exact ids, round trips, streaming and control tokens."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_vocab
from gguf_file import write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.errors import InputError
from edgert.pretokenizers import pretokenizer_for
from edgert.tokenizer import Tokenizer
from edgert.tokenizer_merges import PairTable

FAMILIES = ("llama-spm", "llama-bpe", "qwen2", "gpt-2", "phi-3", "starcoder")
SEPARATOR = "\n__ggml_vocab_test__\n"
quick = settings(max_examples=150, deadline=None, database=None, derandomize=True)

SPM = tiny_vocab.spm_metadata()
BPE = tiny_vocab.bpe_metadata()
SPM_TOKENIZER = Tokenizer.from_manifest(SPM)
BPE_TOKENIZER = Tokenizer.from_manifest(BPE)
BOTH = pytest.mark.parametrize("tokenizer", [SPM_TOKENIZER, BPE_TOKENIZER], ids=["spm", "bpe"])


@pytest.fixture(scope="module")
def family(shared_data: Path) -> Callable[[str], tuple[Tokenizer, list[str], list[list[int]]]]:
    """Tokenizer, texts and expected ids of a published vocabulary."""

    def load(name: str) -> tuple[Tokenizer, list[str], list[list[int]]]:
        path = shared_data / "tokenizers" / f"ggml-vocab-{name}.gguf"
        text = Path(f"{path}.inp").read_bytes().decode()
        ids = Path(f"{path}.out").read_text("utf-8").split("\n")
        texts = text.split(SEPARATOR)
        return Tokenizer.from_gguf(path), texts, [[int(i) for i in line.split()] for line in ids]

    return load


@pytest.mark.parametrize("name", FAMILIES)
def test_published_cases_are_exact(family: Any, name: str) -> None:
    tokenizer, texts, expected = family(name)
    assert len(texts) == len(expected) == 47
    got = [tokenizer.encode(text, add_bos=False) for text in texts]
    wrong = [text for text, ids, want in zip(texts, got, expected, strict=True) if ids != want]
    assert not wrong
    assert [tokenizer.decode(ids) for ids in got] == texts


@pytest.mark.parametrize("name", ["llama3-bpe", "qwen2"])
def test_same_ids_as_the_models_own_tokenizer_json(
    family: Any, shared_data: Path, name: str
) -> None:
    from tokenizers import Tokenizer as Published

    published = Published.from_file(str(shared_data / "tokenizers" / f"{name}.tokenizer.json"))
    published.normalizer = None  # NFC for Qwen, which GGUF files do not carry
    tokenizer, _, _ = family({"llama3-bpe": "llama-bpe"}.get(name, name))
    for text in tiny_vocab.random_texts(1, 300):
        got = tokenizer.encode(text, add_bos=False)
        assert got == published.encode(text, add_special_tokens=False).ids, text


def test_published_special_ids(family: Any) -> None:
    tokenizer, _, _ = family("llama-bpe")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (128000, 128001, 128256)
    assert tokenizer.eos_ids == {128001, 128008, 128009}  # end_of_text, eom_id, eot_id
    assert tokenizer.encode("Hi")[0] == 128000
    tokenizer, _, _ = family("qwen2")
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, {151643, 151645})
    assert tokenizer.encode("<|im_end|>", special=True) == [151645]
    assert 151645 not in tokenizer.encode("<|im_end|>")
    tokenizer, _, _ = family("phi-3")
    assert tokenizer.eos_ids == {32000, 32007}
    assert tokenizer.encode("</s>", add_bos=False) == [2]  # a user-defined token there
    assert tokenizer.chat_template and "<|assistant|>" in tokenizer.chat_template


# --- generated vocabularies -------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_spm_equals_the_obvious_encoder(seed: int) -> None:
    metadata = tiny_vocab.spm_metadata(seed)
    tokenizer = Tokenizer.from_manifest(metadata)
    for text in tiny_vocab.random_texts(seed, 150):
        text = text.replace("<user>", "")
        if text:
            expected = tiny_vocab.spm_encode_ref(metadata, text)
            assert tokenizer.encode(text, add_bos=False) == expected, text


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "smollm", "deepseek-v3"])
def test_bpe_equals_the_obvious_encoder(seed: int, pre: str) -> None:
    metadata = tiny_vocab.bpe_metadata(seed, pre=pre)
    tokenizer = Tokenizer.from_manifest(metadata)
    for text in tiny_vocab.random_texts(seed, 60):
        text = text.replace("<think>", "")
        words = pretokenizer_for(pre).split(text)
        assert "".join(words) == text
        got = tokenizer.encode(text, add_bos=False)
        assert got == tiny_vocab.bpe_encode_ref(metadata, words), text


def test_bpe_equals_the_tokenizers_package() -> None:
    from tokenizers import Tokenizer as Package
    from tokenizers import models, pre_tokenizers

    merges = [tuple(merge.split(" ")) for merge in BPE["tokenizer.ggml.merges"]]
    vocabulary = {text: i for i, text in enumerate(BPE["tokenizer.ggml.tokens"])}
    package = Package(models.BPE(vocabulary, merges))
    package.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer.from_manifest(tiny_vocab.bpe_metadata(pre="gpt-2"))
    for text in tiny_vocab.random_texts(5, 300):
        text = text.replace("<think>", "")
        assert tokenizer.encode(text, add_bos=False) == package.encode(text).ids, text


def test_whole_words_come_before_merges_where_the_family_says_so() -> None:
    # "tttt" can be a token that no merge leads to: only a family that ignores merges finds it.
    tokens = [*BPE["tokenizer.ggml.tokens"], "ttttt"]
    changes = {"tokens": tokens, "token_type": np.ones(len(tokens), np.int32)}
    for pre, whole in (("llama-bpe", True), ("qwen2", False)):
        metadata = tiny_vocab.bpe_metadata(pre=pre, **changes)
        ids = Tokenizer.from_manifest(metadata).encode("ttttt", add_bos=False)
        assert (ids == [len(tokens) - 1]) == whole


def test_spm_pieces_that_cross_words_are_found() -> None:
    # A piece with a space mark inside makes words depend on each other.
    tokens = list(SPM["tokenizer.ggml.tokens"])
    tokens[-2] = f"a{tiny_vocab.SPACE}b"
    tokens[-3] = f"a{tiny_vocab.SPACE}"
    metadata = tiny_vocab.spm_metadata(tokens=tokens)
    tokenizer = Tokenizer.from_manifest(metadata)
    seen = False
    for text in ["a b", "ca bc a b", *tiny_vocab.random_texts(9, 100)]:
        text = text.replace("<user>", "")
        if text:
            ids = tokenizer.encode(text, add_bos=False)
            assert ids == tiny_vocab.spm_encode_ref(metadata, text), text
            seen |= len(tokens) - 3 in ids or len(tokens) - 2 in ids
    assert seen


@BOTH
@quick
@given(text=st.text(max_size=60))
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    for add_bos in (False, True):
        if tokenizer.bos_id is not None or not add_bos:
            ids = tokenizer.encode(text, add_bos=add_bos)
            assert tokenizer.decode(ids) == text.replace(tiny_vocab.SPACE, " ") or (
                tokenizer is BPE_TOKENIZER and tokenizer.decode(ids) == text
            )


def test_round_trip_exceptions_of_spm_are_the_stated_ones() -> None:
    assert SPM_TOKENIZER.decode(SPM_TOKENIZER.encode("a\u2581b")) == "a b"
    assert SPM_TOKENIZER.decode(SPM_TOKENIZER.encode("a<user>b")) == "a<user> b"
    assert SPM_TOKENIZER.decode(SPM_TOKENIZER.encode(" a")) == " a"
    ids = SPM_TOKENIZER.encode("a b", add_bos=False)
    assert SPM_TOKENIZER.decode(ids, at_start=False) == " a b"
    plain = Tokenizer.from_manifest(tiny_vocab.spm_metadata(add_space_prefix=False))
    assert plain.decode(plain.encode("a b")) == "a b"
    assert plain.encode("a", add_bos=False) == [plain.encode("xa", add_bos=False)[-1]]


# --- control and user-defined tokens ----------------------------------------------------------


@BOTH
@quick
@given(
    pieces=st.lists(
        st.one_of(
            st.text(max_size=8),
            st.sampled_from(["<s>", "</s>", "<|im_end|>", "<|im_start|>", "<user>", "<think>"]),
        ),
        max_size=8,
    )
)
def test_text_never_becomes_a_control_token(tokenizer: Tokenizer, pieces: list[str]) -> None:
    ids = tokenizer.encode("".join(pieces), add_bos=False)
    assert not any(tokenizer.is_control(token) for token in ids)


@BOTH
@quick
@given(
    pieces=st.lists(
        st.one_of(
            st.text(max_size=6),
            st.sampled_from(["<s>", "</s>", "<|im_end|>", "<|im_", "end|>", "<", ">", "<think>"]),
            st.sampled_from(["<user>", "\ufdd0", "<|im_start|>"]),
        ),
        max_size=10,
    )
)
def test_guarded_text_is_text_in_a_prompt(tokenizer: Tokenizer, pieces: list[str]) -> None:
    text = "".join(pieces)
    marks = text.replace("\ufdd0", "")
    guarded = tokenizer.guard(text)
    expected = tokenizer.encode(marks, add_bos=False)
    assert tokenizer.encode(guarded, add_bos=False, special=True) == expected
    name = "</s>" if tokenizer is SPM_TOKENIZER else "<|im_end|>"
    end = tokenizer.encode(name, add_bos=False, special=True)
    prompt = f"{name}{guarded}{name}"
    assert tokenizer.encode(prompt, add_bos=False, special=True) == end + expected + end


def test_guard_holds_where_names_overlap() -> None:
    names = ["<a>", "<a><b>", "><b", "b>c"]
    tokens = [*BPE["tokenizer.ggml.tokens"], *names]
    types = [*BPE["tokenizer.ggml.token_type"], 3, 3, 3, 3]
    tokenizer = Tokenizer.from_manifest(tiny_vocab.bpe_metadata(tokens=tokens, token_type=types))
    for text in ("<a><b>c", "<a>b>c", "<<a>><b>cc", "".join(names)):
        plain = tokenizer.encode(text)
        assert tokenizer.encode(text, special=True) != plain
        assert tokenizer.encode(tokenizer.guard(text), special=True) == plain


def test_special_parses_control_tokens_and_user_tokens_always() -> None:
    start, end = (BPE["tokenizer.ggml.tokens"].index(f"<|im_{x}|>") for x in ("start", "end"))
    think = BPE["tokenizer.ggml.tokens"].index("<think>")
    text = "<|im_start|>a<think><|im_end|>"
    ids = BPE_TOKENIZER.encode(text, special=True)
    assert (ids[0], ids[-2], ids[-1]) == (start, think, end)
    assert BPE_TOKENIZER.decode(ids) == "a<think>"
    assert BPE_TOKENIZER.decode(ids, special=True) == text
    assert think in BPE_TOKENIZER.encode(text)
    assert BPE_TOKENIZER.eos_ids == {start - 1, end}
    assert BPE_TOKENIZER.token_text(end) == "<|im_end|>"


def test_spm_puts_a_space_after_a_control_token() -> None:
    tokens = SPM["tokenizer.ggml.tokens"]
    ids = SPM_TOKENIZER.encode("<s>a", add_bos=False, special=True)
    assert ids[0] == 1 and "".join(tokens[i] for i in ids[1:]) == f"{tiny_vocab.SPACE}a"


def test_an_end_token_typed_as_text_is_still_control() -> None:
    types = np.array(BPE["tokenizer.ggml.token_type"])
    types[BPE["tokenizer.ggml.eos_token_id"]] = 1
    tokenizer = Tokenizer.from_manifest(tiny_vocab.bpe_metadata(token_type=types))
    assert tokenizer.eos_id is not None and tokenizer.is_control(tokenizer.eos_id)
    assert tokenizer.eos_id not in tokenizer.encode("<|endoftext|>")


def test_merges_never_make_a_control_token() -> None:
    # A file whose merges spell a control token: the merge is left out, the text stays text.
    types = np.array(BPE["tokenizer.ggml.token_type"])
    words = (merge.replace(" ", "") for merge in BPE["tokenizer.ggml.merges"])
    text = next(word for word in words if word.isascii())
    token = BPE["tokenizer.ggml.tokens"].index(text)
    types[token] = tiny_vocab.CONTROL
    tokenizer = Tokenizer.from_manifest(tiny_vocab.bpe_metadata(token_type=types))
    assert BPE_TOKENIZER.encode(f"x{text}x")[1:-1] == [token]
    assert token not in tokenizer.encode(f"x{text}x{text * 9}")


def test_bos_follows_the_file_the_family_and_the_caller() -> None:
    assert SPM_TOKENIZER.encode("") == [1]
    assert SPM_TOKENIZER.encode("", add_bos=False) == []
    off = Tokenizer.from_manifest(tiny_vocab.spm_metadata(add_bos_token=False))
    assert off.encode("") == [] and off.encode("", add_bos=True) == [1]
    assert BPE_TOKENIZER.encode("") == []
    llama = Tokenizer.from_manifest(tiny_vocab.bpe_metadata(pre="llama-bpe", bos_token_id=257))
    assert llama.encode("") == [257]
    with pytest.raises(InputError, match="add_bos: this vocabulary has no BOS token"):
        BPE_TOKENIZER.encode("", add_bos=True)


# --- streaming --------------------------------------------------------------------------------


@BOTH
@quick
@given(data=st.data())
def test_stream_equals_decode_for_any_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    tokens = st.integers(0, tokenizer.vocab_size - 1) | st.integers(0, 260)  # bytes more often
    ids = data.draw(st.lists(tokens, max_size=40))
    for at_start in (True, False):
        stream = tokenizer.stream_decoder(at_start=at_start)
        text = "".join(map(stream.push, ids)) + stream.flush()
        assert text == tokenizer.decode(ids, at_start=at_start)


@BOTH
def test_stream_never_emits_half_a_character(tokenizer: Tokenizer) -> None:
    for text in tiny_vocab.random_texts(3, 100):
        text = text.replace(tiny_vocab.SPACE, "").replace("<user>", "").replace("\ufffd", "")
        ids = tokenizer.encode(text, add_bos=False)
        stream = tokenizer.stream_decoder()
        so_far = ""
        for count, token in enumerate(ids, 1):
            so_far += stream.push(token)
            assert text.startswith(so_far)
            assert tokenizer.decode(ids[:count]).startswith(so_far)
        assert so_far == text and stream.flush() == ""


def test_stream_marks_bytes_that_are_no_text() -> None:
    emoji = [SPM["tokenizer.ggml.tokens"].index(f"<0x{v:02X}>") for v in "🦙".encode()]
    stream = SPM_TOKENIZER.stream_decoder()
    assert [stream.push(t) for t in emoji] == ["", "", "", "🦙"]
    stream = SPM_TOKENIZER.stream_decoder()
    assert [stream.push(t) for t in (emoji[0], emoji[1])] == ["", ""]
    assert stream.flush() == "\ufffd"
    a = SPM_TOKENIZER.encode("xa", add_bos=False)[-1]
    assert SPM_TOKENIZER.decode([emoji[0], a]) == "\ufffda"


# --- parts ------------------------------------------------------------------------------------


def test_pair_table() -> None:
    table = PairTable([5, 0, 5, 0], [1, 2, 0, 2], [9, 7, 3, 4], [10, 11, 12, 13])
    assert len(table) == 3
    assert [table.find(*pair) >= 0 for pair in ((5, 1), (0, 2), (5, 0))] == [True] * 3
    assert [table.find(*pair) for pair in ((5, 2), (6, 0), (-1, 2), (0, -1), (3, 3))] == [-1] * 5
    assert table.merge([0, 2, 0, 2]) == [(0, 13), (2, 13)]  # the repeated pair: priority 4 wins
    assert PairTable([], [], [], []).merge([1, 2]) == [(0, 1), (1, 2)]
    assert table.merge([]) == []


def test_equal_priorities_go_to_the_left() -> None:
    table = PairTable([1], [1], [0], [2])
    assert table.merge([1] * 5) == [(0, 2), (2, 2), (4, 1)]


def test_from_gguf(tmp_path: Path) -> None:
    path = tmp_path / "vocab.gguf"
    write_gguf(path, {"general.architecture": "llama", **SPM}, {})
    tokenizer = Tokenizer.from_gguf(path)
    assert tokenizer.encode("abc  日") == SPM_TOKENIZER.encode("abc  日")


def test_the_package_is_imported_only_for_bpe_words() -> None:
    code = "import sys, edgert.tokenizer; print('tokenizers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
