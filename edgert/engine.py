"""The engine: a model opened under a memory budget, ready to compute.

Owns: everything that was allocated, in order of opening and closing, and the public API. Must not
know how a pass is computed (forward.py) or how text is made (session.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from edgert.acceptance_file import load_acceptance, save_acceptance
from edgert.accounting import memory_report
from edgert.budget import resolve_budget, within_cgroup
from edgert.chat_template import render_chat
from edgert.config import LoadOptions, SamplingParams
from edgert.device_profile import load_profile, note_drift
from edgert.draft_model import DraftModel
from edgert.draft_walk import DraftWalk
from edgert.elastic_arena import ElasticArena, arena_bytes
from edgert.errors import EdgertError, InputError
from edgert.expert_control import ExpertControl
from edgert.forward import Forward
from edgert.kernels_cpu import rows
from edgert.kernels_cpu.kv_cache import KvLayout
from edgert.kernels_cpu.rope import rope_table
from edgert.machine import available_bytes, trim_heap
from edgert.models.graph import Graph
from edgert.opening import Opened, Progress
from edgert.plan import Plan
from edgert.plan_parts import Need, need_of
from edgert.prediction import Prediction, predict
from edgert.programs import Programs, build_programs, take_buffers
from edgert.results import Completion, MemoryReport, RunStats, TokenEvent
from edgert.session import GenerationOptions, Session, complete
from edgert.storage.backend import Backend
from edgert.storage.pages import cached_bytes
from edgert.threads import ThreadTeam
from edgert.timeline import Span, Timeline, no_span
from edgert.tokenizer import Tokenizer
from edgert.weights import Weights

__all__ = ["Engine"]

Messages = Sequence[Mapping[str, Any]]
_RATE_SECONDS = 0.25  # long enough for a rate within some 5 %


class Engine:
    """A loaded model. Immutable but for its budget, and its KV cache, shared among sessions.

    Any thread may call any method: forward passes run one at a time, in the order they come, and
    each pass of each caller gets the bits it would get alone. `close` ends it; so does `with`.
    Made by `load`.
    """

    def __init__(
        self,
        opened: Opened,
        tokenizer: Tokenizer,
        plan: Plan,
        backend: Backend,
        on_progress: Progress | None = None,
        timeline: Timeline | None = None,
        draft_model: DraftModel | None = None,
    ) -> None:
        self.spec = opened.spec
        self.plan = plan
        self.path = opened.path
        self.tokenizer = tokenizer
        self.last_stats: RunStats | None = None
        self.device_bytes_per_s = 0.0  # until `measure_device`
        self.experts: ExpertControl | None = None  # None: a dense model
        self._drafts: DraftWalk | None = None  # of a nested model
        self.acceptance = load_acceptance(opened.manifest.files, plan)
        self.prediction: Prediction | None = None  # None: this machine was never profiled
        self.span: Span = timeline.span if timeline else no_span
        self._metadata = {
            k: v for k, v in opened.manifest.metadata.items() if k.startswith("general.")
        }
        self._files = opened.manifest.files
        self._cached_before = cached_bytes(self._files)
        self._closed = False
        self._closing = threading.Lock()
        need = need_of(
            opened.spec, opened.manifest, plan.threads, plan.kv_cache_type, plan.tile_bytes
        )
        self._held: list[Callable[[], None]] = [backend.close]  # what `close` undoes, last first
        self.draft_model = draft_model
        if draft_model is not None:
            self._held.append(draft_model.close)
        try:
            self._elastic = ElasticArena(plan, need)
            self._arena = self._elastic.arena
            self._held.append(self._arena.close)
            self.weights = Weights(
                timeline.watch(backend) if timeline else backend, opened.manifest, need, plan,
                self._arena, self._elastic.rooms, self.span,
            )  # fmt: skip
            self._held.append(self.weights.close)
            self._timeline, self._manifest = timeline, opened.manifest
            self._open(need, on_progress)
            self.prediction = self._predict()
        except BaseException:
            self.close()
            raise

    def _open(self, need: Need, on_progress: Progress | None) -> None:
        plan, spec = self.plan, self.spec
        buffers = take_buffers(self._arena, plan, need)
        layout = KvLayout(
            spec.num_key_value_heads, spec.head_dim, plan.context_length, plan.kv_cache_type
        )
        drafts = take_buffers(self._arena, plan, need, drafting=True) if need.bases else None
        kv = self._arena.take("KV cache", spec.num_hidden_layers * layout.layer_bytes, 64)
        table_shape = (plan.context_length, spec.rope_dim // 2, 2)
        table = self._arena.take("rotary table", 4 * plan.context_length * spec.rope_dim, 64)
        self._arena.seal()
        self._team = ThreadTeam(plan.threads)
        self._held.append(self._team.close)
        self.weights.open(
            None if on_progress is None else lambda done, total: on_progress("load", done, total)
        )
        factors = self.weights.vector_values("rope_freqs.weight") if spec.has_rope_freqs else None
        table.view(np.float32).reshape(table_shape)[:] = rope_table(
            spec.rope_theta, spec.rope_dim, 1 / spec.rope_scale, factors, plan.context_length
        )
        self._graph = Graph(
            spec, {n: r for n, (r, _) in buffers.items()}, layout, int(kv.ctypes.data),
            int(table.ctypes.data), plan.threads,
        )  # fmt: skip
        if drafts is not None:
            self._drafts = DraftWalk(self._graph, drafts, self._team, self.weights, self.span)
        programs = build_programs(self._graph, self.weights, self._drafts)
        self._describe(programs, plan)
        self.forward = Forward(
            plan, programs, self._team, self.weights, buffers["x"][1], buffers["logits"][1],
            self.span, self._drafts,
        )  # fmt: skip
        self._held.append(self.forward.close)
        if spec.is_moe:
            floats = {name: values for name, (_, values) in buffers.items()}
            self.experts = ExpertControl(
                spec, self.weights, self.forward, self._team.streams, floats, self._manifest
            )
            self._held.insert(-1, self.experts.close)  # once no pass is under way
        trim_heap()

    def _describe(self, programs: Programs, plan: Plan) -> None:
        """Tell compiled code, and the timeline, what they will walk."""
        addresses = {name: buffer.address for name, buffer in self._graph.buffers.items()}
        self.weights.describe(self._team.streams, addresses)
        if self._timeline:
            self._timeline.describe(programs.full, self._manifest, plan.total_bytes)
            self._team.streams[rows.S_TIMELINE] = self._timeline.address

    def _predict(self) -> Prediction | None:
        """What the plan will do, if the machine was profiled, at the rate last measured."""
        rate = self.device_bytes_per_s
        profile = load_profile(self._files, self.plan.threads)
        if profile is None:
            return None
        if rate:
            note_drift(profile, self._files, rate)
        known = self.experts.profile if self.experts else None
        misses = self.experts.misses(self.plan) if self.experts else None
        chances = known.chances if known else None
        return predict(self.plan, self.spec, self._manifest, profile, rate, misses, chances)

    # ---- facts ---------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of tokens the model has logits for."""
        return self.spec.vocab_size

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.plan.context_length

    @property
    def chat_template(self) -> str | None:
        """The file's own chat template, or None."""
        return self.tokenizer.chat_template

    @property
    def is_streamed(self) -> bool:
        """True when weights are read from flash while tokens are computed."""
        return self.weights.streamer is not None or (
            self.weights.experts is not None
            and self.plan.expert_slots < self.spec.num_hidden_layers * self.spec.num_experts
        )

    def measure_device(self, seconds: float = _RATE_SECONDS) -> float:
        """Bytes per second of direct reads by the reader threads while nothing else is done.

        Between two generations; `device_bytes_per_s` is the last figure. Not part of loading: it
        would delay the first token by as long as it takes. Raises `StorageError`.
        """
        self._check_open()
        self.device_bytes_per_s = self.forward.measure_device(seconds)
        self.prediction = self._predict()
        return self.device_bytes_per_s

    @property
    def predicted_tok_s(self) -> float:
        """Decode speed to expect at the device's rate last measured; 0 without a device profile."""
        return self.prediction.decode_tok_s if self.prediction else 0.0

    def memory(self) -> MemoryReport:
        """Planned against real memory, region by region and as the system counts it; any time."""
        self._check_open()
        return memory_report(self.plan, self._arena, self._files, self._cached_before)

    @property
    def page_cache_bytes(self) -> int:
        """Page cache of the model's files, more than there was when it was opened."""
        return max(0, cached_bytes(self._files) - self._cached_before)

    def set_memory_budget(self, budget: int | str | None) -> Plan:
        """Give memory back, or take more, while the engine goes on; no bit of any output changes.

        `budget`: as for `load`, "50%" being of the same whole; above the limit of the cgroup it is
        that limit. Any thread may call it, also between the tokens of a stream. A smaller budget
        stops the pass under way, which begins again after it; a larger one waits for its end and
        then reads what becomes resident. When this returns the new plan, memory has been given
        back or is in use. Context length and the most tokens of a pass stay as they are. Other
        engines of the process are part of every budget, with all they may use at that moment, and
        stay as they are.

        Raises `BudgetError` with the smallest budget that this engine can come down to,
        `InputError`, `StorageError` when what becomes resident cannot be read: the budget then
        stays what it was.
        """
        self._check_open()
        LoadOptions(memory_budget=budget)  # refuses what is no size
        nbytes = within_cgroup(resolve_budget(budget, self.plan.full_bytes, available_bytes()))
        self._elastic.change(nbytes, self._resize)
        self.prediction = self._predict()
        return self.plan

    def smallest_budget(self) -> int:
        """The smallest budget in bytes that `set_memory_budget` can come down to now."""
        return self._elastic.smallest_budget()

    def _resize(self, plan: Plan, go_on: Callable[[], None]) -> None:
        def on_read(_done: int, _total: int) -> None:
            self.forward.check_open()
            go_on()

        def make() -> tuple[Plan, Programs]:
            programs = build_programs(self._graph, self.weights.under(plan), self._drafts)
            self.weights.resize(plan, on_read)
            self._describe(programs, plan)
            self.plan = plan
            return plan, programs

        self.forward.change(make, at_once=arena_bytes(plan) < arena_bytes(self.plan))
        trim_heap()

    def __repr__(self) -> str:
        return f"Engine({self.path.name}, {self.spec.architecture}, {self.plan.budget_bytes} bytes)"

    def tokenize(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """The tokens of `text`; names of control tokens in it are ordinary text."""
        return self.tokenizer.encode(text, add_bos=add_bos)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, control tokens left out."""
        return self.tokenizer.decode(tokens)

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits after each of `tokens`: float32 [n_tokens, n_vocab], the caller's own memory.

        The same bits at any budget, thread count and chunk size. Raises `ContextError`.
        """
        self._check_open()
        return self.forward.evaluate(list(tokens), self.vocab_size, last=len(tokens))

    # ---- text ----------------------------------------------------------------------------------

    def session(self) -> Session:
        """A new, empty timeline of tokens."""
        self._check_open()
        return Session(self)

    @overload
    def generate(
        self, prompt: str | Sequence[int], *, stream: Literal[False] = False, **options: Any
    ) -> Completion: ...

    @overload
    def generate(
        self, prompt: str | Sequence[int], *, stream: Literal[True], **options: Any
    ) -> Iterator[TokenEvent]: ...

    def generate(
        self, prompt: str | Sequence[int], *, stream: bool = False, **options: Any
    ) -> Completion | Iterator[TokenEvent]:
        """Continue a text or a list of tokens.

        Options: `max_tokens` (None: until the text ends or the context is full), `temperature`,
        `top_k`, `top_p`, `min_p`, `repeat_penalty`, `repeat_last_n`, `presence_penalty`,
        `frequency_penalty`, `logit_bias`, `seed` (None draws one), `stop` (a text or several),
        `on_prefill(done, total)`; `speculate` (True) guesses tokens from what was said before, or
        with the top bits of a nested pack, and verifies up to `draft_max` of them in a pass where
        that is faster: the same tokens, sooner.
        Defaults are the model's own (`general.sampling.*`), else llama.cpp's.

        Returns a `Completion`, or with `stream` an iterator of `TokenEvent`; closing it ends the
        generation. Raises `ContextError`, `InputError`, `StorageError`.
        """
        tokens = self.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        return self._run(tokens, stream, options)

    def chat(
        self, messages: Messages, *, stream: bool = False, **options: Any
    ) -> Completion | Iterator[TokenEvent]:
        """Answer a conversation, rendered with the file's own chat template.

        `messages`: {"role": "system" | "user" | "assistant", "content": text}; options as in
        `generate`.
        """
        return self._run(self.chat_tokens(messages), stream, options)

    def chat_tokens(self, messages: Messages) -> list[int]:
        """The tokens of a conversation, as `chat` gives them to the model.

        Names of control tokens in messages are ordinary text: a user can neither end nor forge a
        turn.
        """
        text = self._render(messages, self.tokenizer.guard)
        return self.tokenizer.encode(text, add_bos=False, special=True)

    def render(self, messages: Messages) -> str:
        """The prompt text of a conversation, to read; `chat_tokens` is what the model gets."""
        return self._render(messages, None)

    def _render(self, messages: Messages, guard: Callable[[str], str] | None) -> str:
        tokenizer = self.tokenizer
        bos, eos = (
            "" if token is None else tokenizer.token_text(token)
            for token in (tokenizer.bos_id, tokenizer.eos_id)
        )
        return render_chat(
            tokenizer.chat_template, messages, bos_token=bos, eos_token=eos, guard=guard
        )

    def _run(
        self, tokens: list[int], stream: bool, options: dict[str, Any]
    ) -> Completion | Iterator[TokenEvent]:
        session = self.session()
        events = session.generate(tokens, self.options(**options))
        return events if stream else complete(events, session)

    def options(
        self,
        *,
        max_tokens: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        on_prefill: Callable[[int, int], object] | None = None,
        speculate: bool = True,
        draft_max: int = 15,
        **sampling: Any,
    ) -> GenerationOptions:
        """Checked options of one generation. Raises `InputError` naming what is wrong."""
        try:
            params = SamplingParams.from_metadata(self._metadata, **sampling)
        except TypeError as error:
            raise InputError(f"generate: {error}") from None
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        return GenerationOptions(params, max_tokens, seed, stops, on_prefill, speculate, draft_max)

    def _check_open(self) -> None:
        if self._closed:
            raise EdgertError("the engine is closed; load the model again")

    def close(self) -> None:
        """Stop the threads and give all memory back. Idempotent; a pass under way is stopped."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        save_acceptance(self._files, self.plan, self.acceptance)
        while self._held:
            self._held.pop()()
        trim_heap()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
