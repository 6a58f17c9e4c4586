"""Text in, text out: where a generation ends, what it shows, and what it costs.

The model is random; what it says is made up by a script where a test needs certain tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgert
from edgert.errors import ContextError, InputError
from edgert.results import Completion, TokenEvent
from tests.gguf_file import write_gguf
from tests.tight import tight
from tests.tiny import build, prompt_of

PROMPT = prompt_of("llama", 20)
GREEDY: dict[str, Any] = dict(temperature=0)


@pytest.fixture(scope="module")
def engine(tiny_gguf: Path) -> Iterator[edgert.Engine]:
    with tight(tiny_gguf, None) as engine:
        yield engine


@pytest.fixture
def script(engine: edgert.Engine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes every generation say given tokens: the model computes, another picks."""

    def say(tokens: Sequence[int]) -> None:
        def sample(sampler: object, logits: Any, recent: Sequence[int] = ()) -> int:
            assert logits.shape == (engine.vocab_size,)
            return tokens[len(recent) - len(PROMPT)]

        monkeypatch.setattr("edgert.session.Sampler.sample", sample)

    return say


def spelled(engine: edgert.Engine, text: str) -> list[int]:
    """The tokens of the letters of `text`, one each, and no space in front."""
    pieces = {engine.tokenizer.token_text(i): i for i in range(259, engine.vocab_size)}
    return [pieces[letter] for letter in text]


def generate(engine: edgert.Engine, **options: Any) -> Completion:
    done = engine.generate(PROMPT, **GREEDY | options)
    assert isinstance(done, Completion)
    return done


# ------------------------------------------------------------------------ where it ends


@pytest.mark.parametrize("count", [0, 1, 5])
def test_max_tokens(engine: edgert.Engine, count: int) -> None:
    done = generate(engine, max_tokens=count)
    assert (len(done.tokens), done.finish_reason) == (count, "length")
    assert done.stats.generated_tokens == count
    assert done.tokens == generate(engine, max_tokens=5).tokens[:count]


def test_the_end_of_text_token_ends_it_and_is_not_shown(engine: edgert.Engine, script: Any) -> None:
    letters = spelled(engine, "one tale")
    script([*letters, engine.tokenizer.eos_id])
    done = generate(engine, max_tokens=50)
    assert (done.text, done.tokens, done.finish_reason) == ("one tale", tuple(letters), "stop")
    events = list(engine.generate(PROMPT, stream=True, **GREEDY))
    assert events[-1] == TokenEvent("", None, len(letters), "stop")


@pytest.mark.parametrize(
    ("stop", "text", "count"),
    [
        ("tale", "one ", 8), (["never", "e t"], "on", 5), ("o", "", 1), (("tales",), "one tale", 8),
        (["tale of", "one tale", "le"], "", 8),
    ],
)  # fmt: skip
def test_stop_strings_run_across_tokens(
    engine: edgert.Engine, script: Any, stop: Any, text: str, count: int
) -> None:
    script(spelled(engine, "one tale"))
    done = generate(engine, max_tokens=8, stop=stop)
    assert (done.text, len(done.tokens)) == (text, count)
    assert done.finish_reason == ("length" if text == "one tale" else "stop")
    events = list(engine.generate(PROMPT, stream=True, max_tokens=8, stop=stop, **GREEDY))
    assert "".join(e.text for e in events) == text
    assert [e.finish_reason for e in events[:-1]] == [None] * (len(events) - 1)


def test_a_full_context_is_a_length(engine: edgert.Engine) -> None:
    tokens = (PROMPT * 13)[: engine.context_length - 3]
    done = engine.generate(tokens, **GREEDY)
    assert isinstance(done, Completion)
    assert (len(done.tokens), done.finish_reason) in ((3, "length"), (len(done.tokens), "stop"))
    session = engine.session()
    events = list(session.generate(tokens, engine.options(max_tokens=None, logit_bias={2: -1e6})))
    assert len(events) == 3 and events[-1].finish_reason == "length"
    assert session.position == engine.context_length
    with pytest.raises(ContextError):
        list(session.generate([5], engine.options()))


def test_a_prompt_that_leaves_no_room_is_refused(engine: edgert.Engine) -> None:
    with pytest.raises(ContextError) as caught:
        engine.generate([1] * 256, max_tokens=1)
    assert (caught.value.tokens, caught.value.context_length) == (257, 256)
    assert generate(engine, max_tokens=1).finish_reason == "length"


def test_an_empty_prompt_begins_with_the_start_token_or_is_refused(engine: edgert.Engine) -> None:
    done = engine.generate("", max_tokens=2, **GREEDY)
    assert isinstance(done, Completion)
    assert done.stats.prompt_tokens == 1
    with pytest.raises(InputError, match="the prompt is empty"):
        engine.generate([], max_tokens=2)


# ------------------------------------------------------------------------ what it shows


def test_streamed_text_is_the_text_is_the_decoded_tokens(engine: edgert.Engine) -> None:
    """Random tokens: broken characters, bytes and pieces."""
    for seed in range(5):
        options: dict[str, Any] = dict(max_tokens=40, seed=seed, temperature=1.5, top_p=1.0)
        events = list(engine.generate(PROMPT, stream=True, **options))
        done = engine.generate(PROMPT, **options)
        assert isinstance(done, Completion)
        assert "".join(e.text for e in events) == done.text
        assert tuple(e.token for e in events if e.token is not None) == done.tokens
        assert [e.index for e in events] == list(range(len(events)))
        decoder = engine.tokenizer.stream_decoder(at_start=False)
        assert done.text == "".join(map(decoder.push, done.tokens)) + decoder.flush()


def test_a_character_of_several_bytes_comes_whole(engine: edgert.Engine, script: Any) -> None:
    spoken = [3 + byte for byte in "aé€😀".encode()]
    script([*spoken, engine.tokenizer.eos_id])
    texts = [e.text for e in engine.generate(PROMPT, stream=True, **GREEDY)]
    assert "".join(texts) == "aé€😀"
    assert set(texts) == {"a", "é", "€", "😀", ""}


def test_the_prefill_is_reported_pass_by_pass(tiny_gguf: Path) -> None:
    seen: list[tuple[int, int]] = []
    with tight(tiny_gguf, None, prefill_tokens=8) as engine:
        options: dict[str, Any] = dict(
            max_tokens=2, on_prefill=lambda done, total: seen.append((done, total))
        )
        generate(engine, **options)
        assert seen == [(8, 20), (16, 20), (20, 20)]
        seen.clear()
        generate(engine, **options)  # all but the last token is in the KV cache
        assert seen == [(20, 20)]


def test_the_figures_add_up(engine: edgert.Engine) -> None:
    engine.logits([9])  # nothing of the prompt is cached
    stats = generate(engine, max_tokens=5).stats
    assert (stats.prompt_tokens, stats.reused_tokens, stats.generated_tokens) == (20, 0, 5)
    assert stats.prefill_tok_s == pytest.approx(20 / stats.prefill_seconds)
    assert stats.decode_tok_s == pytest.approx(4 / stats.decode_seconds)
    assert engine.last_stats == stats and len(stats.logits_hash) == 16
    assert stats.resident_bytes == engine.plan.resident_bytes
    assert set(stats.to_dict()) >= {"seed", "logits_hash", "stall_share", "peak_bytes"}


# ------------------------------------------------------------------------ chance


def test_the_same_seed_says_the_same_and_is_reported(engine: edgert.Engine) -> None:
    how: dict[str, Any] = dict(max_tokens=20, temperature=1.0)
    first = generate(engine, seed=7, **how)
    assert first.stats.seed == 7
    assert generate(engine, seed=7, **how).tokens == first.tokens
    assert generate(engine, seed=8, **how).tokens != first.tokens
    drawn = [generate(engine, **how) for _ in range(2)]
    assert drawn[0].stats.seed != drawn[1].stats.seed
    assert generate(engine, seed=drawn[0].stats.seed, **how).tokens == drawn[0].tokens


@pytest.mark.parametrize(
    "options",
    [
        {"temprature": 1.0}, {"temperature": -1}, {"temperature": "hot"}, {"top_p": 2},
        {"seed": -1}, {"seed": "x"}, {"max_tokens": -1}, {"stop": ""}, {"stop": ["a", ""]},
        {"top_k": 1.5},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_make_no_sense_are_refused_by_name(
    engine: edgert.Engine, options: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=next(iter(options)).split("_")[0]):
        engine.generate(PROMPT, **{"max_tokens": 2} | options)


def test_the_files_own_sampling_is_the_default(tiny_gguf: Path, tmp_path: Path) -> None:
    model = build("llama", "Q8_0")
    path = tmp_path / "greedy.gguf"
    write_gguf(path, model.metadata | {"general.sampling.temp": 0.0}, model.tensors)
    with tight(path, None) as engine:
        found = [engine.generate(PROMPT, max_tokens=8) for _ in range(2)]
        warm = engine.generate(PROMPT, max_tokens=8, temperature=5.0, seed=1)
    assert found[0].tokens == found[1].tokens != warm.tokens


# ------------------------------------------------------------------------ timelines and chats


def test_a_session_goes_on_where_it_was(engine: edgert.Engine) -> None:
    session, options = engine.session(), engine.options(max_tokens=3, **GREEDY)
    first = [e.token for e in session.generate(PROMPT, options)]
    assert session.tokens == [*PROMPT, *first] and session.position == 23
    second = [e.token for e in session.generate([40, 41], options)]
    assert session.last_stats is not None and session.last_stats.reused_tokens == 22
    whole = engine.generate([*PROMPT, *map(int, first), 40, 41], max_tokens=3, **GREEDY)
    assert isinstance(whole, Completion) and list(whole.tokens) == second
    session.reset()
    assert session.position == 0
    assert [e.token for e in session.generate(PROMPT, options)] == first


MESSAGES = [{"role": "user", "content": "a tale"}]


def test_chat_uses_the_files_template(tmp_path: Path) -> None:
    model = build("llama", "Q8_0")
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
    keys = model.metadata | {"tokenizer.chat_template": template}
    with tight(write_gguf(tmp_path / "chat.gguf", keys, model.tensors), None) as engine:
        assert engine.chat_template == template
        assert engine.render(MESSAGES) == "<s>user: a tale;"
        done = engine.chat(MESSAGES, max_tokens=4, **GREEDY)
        tokens = engine.tokenizer.encode("<s>user: a tale;", add_bos=False, special=True)
        assert tokens[0] == 1
        assert done.tokens == engine.generate(tokens, max_tokens=4, **GREEDY).tokens


def test_a_message_cannot_forge_a_control_token(engine: edgert.Engine) -> None:
    """Neither through the API nor through the command line, which share `chat_tokens`."""
    from edgert.cli.answer import _tokens

    bos = engine.tokenizer.bos_id
    assert bos is not None
    name = engine.tokenizer.token_text(bos)
    assert engine.tokenizer.encode(name, add_bos=False, special=True) == [bos]
    forged = [{"role": "user", "content": f"a{name}b"}]
    assert engine.chat_tokens(forged).count(bos) == engine.chat_tokens(MESSAGES).count(bos)
    assert _tokens(engine, forged) == engine.chat_tokens(forged)


def test_chat_works_without_a_template(engine: edgert.Engine) -> None:
    assert engine.chat_template is None
    assert "a tale" in engine.render(MESSAGES)
    events = list(engine.chat(MESSAGES, stream=True, max_tokens=4, **GREEDY))
    assert [e.finish_reason for e in events] == [None] * (len(events) - 1) + ["length"]
    with pytest.raises(InputError):
        engine.render([{"role": "user", "content": 7}])


def test_every_logit_that_is_sampled_is_of_the_last_token(
    engine: edgert.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Any] = []

    def sample(sampler: object, logits: Any, recent: Sequence[int] = ()) -> int:
        heard.append(logits.copy())
        return 30 + len(heard)

    monkeypatch.setattr("edgert.session.Sampler.sample", sample)
    done = generate(engine, max_tokens=4)
    assert done.tokens == (31, 32, 33, 34)
    every = engine.logits([*PROMPT, 31, 32, 33])
    assert np.array_equal(np.stack(heard), every[-4:])
