"""One side of `edgert bench --baseline`: an engine in a process of its own, asked through a pipe.

Owns: two engines behind one question, and the clock. Must not know what is compared. Run as a
program, `python bench_worker.py ENGINE OPTIONS`, by any Python 3.8 or later that has the engine:
only the standard library is imported before it is. OPTIONS is a JSON object.

Each line of stdin is a request {"past": [token], "tokens": [token], "single": bool}; each line of
stdout an answer: {"ready": {...}}, {"progress": [what, done, total]}, {"seconds": s, "top": token}
or {"error": text, "missing": bool}. When the clock starts, `past` is in the KV cache and one pass
has just been computed, so that the engine is awake. Then come `tokens`, in one pass or, `single`,
one in a pass; "top" is the likeliest next token.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

__all__ = ["main"]


class _Edgert:
    """edgert with the options of the command line."""

    def __init__(self, tell: Any, path: str, **options: Any) -> None:
        import edgert

        def show(what: str, done: int, total: int) -> None:
            tell({"progress": [what, done, total]})

        self._engine = edgert.load(path, on_progress=show, **options)
        self._held: list[int] = []
        self.facts = {"version": edgert.__version__}

    def hold(self, past: list[int], first: int) -> None:
        """Make the KV cache hold `past`. It keeps what the next call begins with: not `first`."""
        self._evaluate(past or [(first + 1) % self._engine.vocab_size])
        self._held = list(past)

    def add(self, tokens: list[int]) -> None:
        self._held += tokens
        self._evaluate(self._held)

    def _evaluate(self, tokens: list[int]) -> None:
        self._logits = self._engine.forward.evaluate(tokens, self._engine.vocab_size)

    def top(self) -> int:
        return int(self._logits[-1].argmax())


class _LlamaCpp:
    """llama.cpp as llama-cpp-python sets it up, but for threads and sizes.

    Without `repack` all weights stay in the mapped file. The repacked ones are memory that the
    system cannot drop: in a limit below their size they never load.
    """

    def __init__(
        self, tell: Any, path: str, threads: int, context_length: int, repack: bool = True
    ) -> None:
        import llama_cpp
        import numpy

        self._numpy = numpy
        if not repack:
            _without_repacking(llama_cpp.llama_cpp)
        self._llama = llama_cpp.Llama(
            path, n_ctx=context_length, n_batch=512, n_threads=threads, n_threads_batch=threads,
            verbose=False,
        )  # fmt: skip
        self._held: list[int] = []
        self.facts = {
            "version": llama_cpp.__version__,
            "features": llama_cpp.llama_print_system_info().decode(),
        }

    def hold(self, past: list[int], first: int) -> None:
        """Make the KV cache hold `past`; `eval` forgets what lies behind `n_tokens`."""
        known = bool(past) and self._held[: len(past)] == past
        self._llama.n_tokens = len(past) - 1 if known else 0
        self._llama.eval(past[-1:] if known else past or [first])
        self._llama.n_tokens = len(past)
        self._held = list(past)

    def add(self, tokens: list[int]) -> None:
        self._llama.eval(tokens)
        self._llama._ctx.get_logits()  # waits for the end of the pass
        self._held += tokens

    def top(self) -> int:
        logits = self._llama._ctx.get_logits()
        return int(self._numpy.ctypeslib.as_array(logits, (self._llama.n_vocab(),)).argmax())


def _without_repacking(library: Any) -> None:
    """Change the default that `Llama` begins with; it takes no such option."""
    make = library.llama_model_default_params

    def params() -> Any:
        found = make()
        found.use_extra_bufts = False
        return found

    library.llama_model_default_params = params


_ENGINES: dict[str, Any] = {"edgert": _Edgert, "llamacpp": _LlamaCpp}


def _measure(engine: Any, past: list[int], tokens: list[int], single: bool) -> dict[str, Any]:
    engine.hold(past, tokens[0])
    passes = [[token] for token in tokens] if single else [tokens]
    begin = time.perf_counter()
    for one in passes:
        engine.add(one)
    return {"seconds": time.perf_counter() - begin, "top": engine.top()}


def main(arguments: list[str]) -> None:
    """Serve until stdin ends."""
    # What the engine or its libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        engine = _ENGINES[arguments[0]](tell, **json.loads(arguments[1]))
        tell({"ready": engine.facts})
        for line in sys.stdin:
            tell(_measure(engine, **json.loads(line)))
    except Exception as error:
        missing = isinstance(error, ImportError)
        tell({"error": str(error) or type(error).__name__, "missing": missing})


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder: its modules are not top-level ones
    main(sys.argv[1:])
