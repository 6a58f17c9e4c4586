"""What a caller may choose: sampling and loading options, checked once when made.

Owns: the options, their defaults and allowed ranges. Environment variables would be read here and
nowhere else; there are none. Must not know how an option is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgert.errors import InputError
from edgert.units import parse_bytes

__all__ = ["LoadOptions", "SamplingParams"]

# GGUF key after "general.sampling." -> field.
_METADATA_KEYS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repeat_penalty",
    "penalty_last_n": "repeat_last_n",
}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn; the steps run in the order of the fields, temperature last.

    The defaults are llama.cpp's. Raises `InputError` naming the field, its value and its range.
    """

    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # -inf bans a token
    repeat_penalty: float = 1.0  # 1.0 is off
    repeat_last_n: int = 64  # tokens the penalties look at; 0 is none, -1 all
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_k: int = 40  # 0 is off
    top_p: float = 0.95  # 1.0 is off
    min_p: float = 0.05  # 0.0 is off
    temperature: float = 0.8  # 0 takes the most likely token

    def __post_init__(self) -> None:
        _real("temperature", self.temperature, 0.0, 1000.0)
        _whole("top_k", self.top_k, 0, 2**31 - 1)
        _real("top_p", self.top_p, 0.0, 1.0)
        _real("min_p", self.min_p, 0.0, 1.0)
        _real("repeat_penalty", self.repeat_penalty, 0.01, 100.0)
        _whole("repeat_last_n", self.repeat_last_n, -1, 2**31 - 1)
        _real("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _real("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        for token, bias in self.logit_bias.items():
            _whole("a token of logit_bias", token, 0, 2**31 - 1)
            if bias != -math.inf:
                _real(f"logit_bias[{token}]", bias, -1e6, 1e6)
        # A private copy: a caller that changes its dictionary later must not change a frozen value.
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], **chosen: Any) -> SamplingParams:
        """The model's own recommendation (`general.sampling.*`), overruled by `chosen`.

        A `chosen` value of None means "not chosen". A recommendation that is out of range is the
        file's fault but harmless: it is left out. Kinds of sampling that are not here are ignored.
        """
        fields: dict[str, Any] = {}
        for key, name in _METADATA_KEYS.items():
            value = metadata.get(f"general.sampling.{key}")
            if value is not None:
                try:
                    cls(**{name: value})
                except InputError:
                    continue
                fields[name] = value
        fields.update((name, value) for name, value in chosen.items() if value is not None)
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a model is loaded; None leaves the choice to the plan. Raises `InputError`."""

    memory_budget: int | str | None = None  # bytes, "1.5GiB" or "50%" of what the whole model needs
    context_length: int | None = None  # tokens
    threads: int | None = None
    kv_cache_type: str = "f16"
    prefill_tokens: int | None = None  # tokens computed together while reading the prompt
    quality_bits: int | str | None = None  # top ones, of a nested pack: lossy; "auto": what fits
    verify_checksums: bool = False  # of a pack: compare all that is read

    def __post_init__(self) -> None:
        _check_budget(self.memory_budget)
        if self.context_length is not None:
            _whole("context_length", self.context_length, 1, 2**31 - 1)
        if self.threads is not None:
            _whole("threads", self.threads, 1, 1024)
        if self.kv_cache_type not in ("f16", "f32"):
            raise InputError(f"kv_cache_type is {self.kv_cache_type!r}; choose 'f16' or 'f32'")
        if self.prefill_tokens is not None:
            _whole("prefill_tokens", self.prefill_tokens, 1, 2**20)
        if self.quality_bits not in (None, "auto"):
            _whole("quality_bits", self.quality_bits, 1, 8)


def _check_budget(budget: int | str | None) -> None:
    if budget is None:
        return
    if isinstance(budget, str):
        text = budget.strip()
        if not text.endswith("%"):
            _whole("memory_budget", parse_bytes(text), 1, 2**63 - 1)
            return
        try:
            percent = float(text[:-1])
        except ValueError:
            raise InputError(f"memory_budget is {budget!r}; write one like 1.5GiB or 50%") from None
        if not 0.0 < percent <= 100.0:
            raise InputError(f"memory_budget is {budget!r}; a share is above 0% and at most 100%")
        return
    _whole("memory_budget", budget, 1, 2**63 - 1)


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InputError(f"{name} is {value!r}; it must be a whole number of at least {low}")
    number = value.__index__()
    if not low <= number <= high:
        raise InputError(f"{name} is {number}; it must be between {low} and {high}")


def _real(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise InputError(f"{name} is {value!r}; it must be a number between {low:g} and {high:g}")
    number = float(value)
    if not low <= number <= high:  # also false for NaN
        raise InputError(f"{name} is {number:g}; it must be between {low:g} and {high:g}")
