"""Chat templates: messages to the prompt text a model was trained on.

Owns: running the model file's Jinja template in a sandbox, and the limits on what it may do.
Must not know tokens. The template comes with the model and is not trusted: it sees no internals of
Python objects, and its steps, its numbers and its texts are bounded, so that a hostile one ends in
an error instead of taking the machine. jinja2 is imported on first use: 45 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from edgert.errors import InputError, ModelError

__all__ = ["DEFAULT_TEMPLATE", "render_chat"]

DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

_TEMPLATE_CHARS_MAX = 2**20  # the longest in use are about 20,000
_OUTPUT_CHARS_MAX = 2**24


def render_chat(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
    tools: Sequence[Mapping[str, Any]] | None = None,
    guard: Callable[[str], str] | None = None,
    **kwargs: Any,
) -> str:
    """The prompt for `messages`, each with "role" and "content" (a text, or a list of text parts).

    `template` None is `DEFAULT_TEMPLATE`. Other keys of a message and `kwargs` reach the template
    unchanged. The result holds control tokens by name: encode it with `special=True`. `guard`
    (`Tokenizer.guard`) is applied to all texts in messages and tools, so that none forges a token.
    Raises `InputError` for messages that are malformed or that the template refuses, and
    `ModelError` for a template that is broken or goes beyond its limits.
    """
    import jinja2

    from edgert.chat_sandbox import ALLOWANCE, Allowance, LimitError, RefusedError

    checked = [_checked_message(i, message) for i, message in enumerate(messages)]
    if guard is not None:
        checked = _guarded(checked, guard)
        tools = _guarded(tools, guard)
    values = {
        "messages": checked,
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos_token,
        "eos_token": eos_token,
        "strftime_now": _now,
        **kwargs,
        ALLOWANCE: Allowance(),
    }
    if tools is not None:
        values["tools"] = list(tools)
    try:
        compiled = _compiled(DEFAULT_TEMPLATE if template is None else template)
        return _collected(compiled.generate(values), LimitError)
    except RefusedError as error:
        raise InputError(f"the chat template refuses these messages: {_line(error)}") from None
    except LimitError as error:
        raise ModelError(f"the chat template was stopped: {_line(error)}") from None
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"chat template, line {error.lineno}: {_line(error.message)}") from None
    except RecursionError:
        raise ModelError("the chat template was stopped: it calls itself too deeply") from None
    except Exception as error:  # a template may fail in as many ways as a Python program
        kind = type(error).__name__
        raise ModelError(f"the chat template failed ({kind}): {_line(error)}") from None


def _guarded(value: Any, guard: Callable[[str], str]) -> Any:
    """A copy in which `guard` was applied to every text at any depth, keys included."""
    if isinstance(value, str):
        return guard(value)
    if isinstance(value, Mapping):
        return {_guarded(k, guard): _guarded(v, guard) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_guarded(item, guard) for item in value]
    return value


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _collected(parts: Any, limit_error: Callable[[str], Exception]) -> str:
    text = []
    size = 0
    for part in parts:
        size += len(part)
        if size > _OUTPUT_CHARS_MAX:
            raise limit_error(f"its text is longer than {_OUTPUT_CHARS_MAX:,} characters")
        text.append(part)
    return "".join(text)


@lru_cache(maxsize=4)
def _compiled(template: str) -> Any:
    from edgert.chat_sandbox import make_environment

    if len(template) > _TEMPLATE_CHARS_MAX:
        raise ModelError(
            f"the chat template has {len(template):,} characters, "
            f"more than the {_TEMPLATE_CHARS_MAX:,} allowed"
        )
    return make_environment().from_string(template)


def _line(error: object) -> str:
    return " ".join(str(error).split())[:200] or "no reason given"


def _checked_message(index: int, message: Any) -> dict[str, Any]:
    """A copy of one message with its content as one text. Raises `InputError` that names it."""
    if not isinstance(message, Mapping):
        raise InputError(f"message {index} is a {type(message).__name__}, expected a mapping")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InputError(f"message {index} has the role {role!r}, expected a text such as 'user'")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return dict(message)  # an answer that only calls tools has no text
    if isinstance(content, (list, tuple)):
        texts = [_part_text(index, part) for part in content]
        return {**message, "content": "".join(texts)}
    if not isinstance(content, str):
        raise InputError(
            f"message {index} ({role}) has content of type {type(content).__name__}, expected a "
            'text or a list of {"type": "text", "text": ...}'
        )
    return dict(message)


def _part_text(index: int, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise InputError(f"message {index} has a part of type {kind!r}; only 'text' is supported")
