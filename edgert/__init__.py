"""edgert runs language models bigger than the memory they may use.

    >>> import edgert
    >>> with edgert.load("model.gguf", memory_budget="600MiB") as engine:  # doctest: +SKIP
    ...     for event in engine.generate("Once upon a time", max_tokens=64, stream=True):
    ...         print(event.text, end="", flush=True)

Owns: the public names. `import edgert` loads neither numba, tokenizers nor NumPy: everything but
the errors and units comes with the first use of its name (PEP 562), which keeps
`edgert --help` and an application's own start fast.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.errors import (
    BudgetError,
    BudgetExceededError,
    CancelledError,
    ContextError,
    EdgertError,
    FormatError,
    InputError,
    ModelError,
    StorageError,
    TokenizerError,
    UnsupportedError,
)
from edgert.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from edgert.attention_bench import bench_attention
    from edgert.bench_harness import KernelFigures
    from edgert.config import SamplingParams
    from edgert.device_profile import DeviceProfile
    from edgert.diagnosis import diagnose
    from edgert.engine import Engine
    from edgert.evaluation import CHUNK_TOKENS, Perplexity, bundled_text, perplexity
    from edgert.expert_profile import ExpertProfile, read_expert_profile
    from edgert.expert_quantizing import QuantizedExperts, quantize_experts
    from edgert.expert_simulation import SIMULATED, Figure, simulate
    from edgert.expert_tuning import Trial, synthetic_routing, tune_policy
    from edgert.forecasting import Forecast, forecast, profile_device
    from edgert.kernel_bench import bench_kernels
    from edgert.opening import load, plan_model, read_manifest, warmup
    from edgert.pack import pack_model
    from edgert.plan import Plan
    from edgert.prediction import Prediction
    from edgert.pressure import follow_pressure
    from edgert.results import Completion, MemoryReport, RunStats, TokenEvent, logits_hash
    from edgert.routing import Routing, join_passes, read_routing, write_routing
    from edgert.session import Session
    from edgert.storage.gguf import read_gguf
    from edgert.storage.manifest import Manifest
    from edgert.storage.pack_verify import verify_pack
    from edgert.timeline import Timeline
    from edgert.tokenizer import Tokenizer

__all__ = [
    "CHUNK_TOKENS",
    "SIMULATED",
    "BudgetError",
    "BudgetExceededError",
    "CancelledError",
    "Completion",
    "ContextError",
    "DeviceProfile",
    "EdgertError",
    "Engine",
    "ExpertProfile",
    "Figure",
    "Forecast",
    "FormatError",
    "InputError",
    "KernelFigures",
    "Manifest",
    "MemoryReport",
    "ModelError",
    "Perplexity",
    "Plan",
    "Prediction",
    "QuantizedExperts",
    "Routing",
    "RunStats",
    "SamplingParams",
    "Session",
    "StorageError",
    "Timeline",
    "TokenEvent",
    "Tokenizer",
    "TokenizerError",
    "Trial",
    "UnsupportedError",
    "__version__",
    "bench_attention",
    "bench_kernels",
    "bundled_model",
    "bundled_text",
    "diagnose",
    "follow_pressure",
    "forecast",
    "format_bytes",
    "join_passes",
    "load",
    "logits_hash",
    "pack_model",
    "parse_bytes",
    "perplexity",
    "plan_model",
    "profile_device",
    "quantize_experts",
    "read_expert_profile",
    "read_gguf",
    "read_manifest",
    "read_routing",
    "simulate",
    "synthetic_routing",
    "tune_policy",
    "verify_pack",
    "warmup",
    "write_routing",
]

__version__ = "0.1.0"

_LAZY = {  # public name -> module that defines it
    "CHUNK_TOKENS": "edgert.evaluation",
    "SIMULATED": "edgert.expert_simulation",
    "Completion": "edgert.results",
    "DeviceProfile": "edgert.device_profile",
    "Engine": "edgert.engine",
    "ExpertProfile": "edgert.expert_profile",
    "Figure": "edgert.expert_simulation",
    "Forecast": "edgert.forecasting",
    "KernelFigures": "edgert.bench_harness",
    "Manifest": "edgert.storage.manifest",
    "MemoryReport": "edgert.results",
    "Perplexity": "edgert.evaluation",
    "Plan": "edgert.plan",
    "Prediction": "edgert.prediction",
    "Routing": "edgert.routing",
    "QuantizedExperts": "edgert.expert_quantizing",
    "RunStats": "edgert.results",
    "SamplingParams": "edgert.config",
    "Session": "edgert.session",
    "Timeline": "edgert.timeline",
    "TokenEvent": "edgert.results",
    "Tokenizer": "edgert.tokenizer",
    "Trial": "edgert.expert_tuning",
    "bench_attention": "edgert.attention_bench",
    "bench_kernels": "edgert.kernel_bench",
    "bundled_text": "edgert.evaluation",
    "diagnose": "edgert.diagnosis",
    "follow_pressure": "edgert.pressure",
    "forecast": "edgert.forecasting",
    "join_passes": "edgert.routing",
    "load": "edgert.opening",
    "logits_hash": "edgert.results",
    "pack_model": "edgert.pack",
    "perplexity": "edgert.evaluation",
    "plan_model": "edgert.opening",
    "profile_device": "edgert.forecasting",
    "quantize_experts": "edgert.expert_quantizing",
    "read_expert_profile": "edgert.expert_profile",
    "read_gguf": "edgert.storage.gguf",
    "read_manifest": "edgert.opening",
    "read_routing": "edgert.routing",
    "simulate": "edgert.expert_simulation",
    "synthetic_routing": "edgert.expert_tuning",
    "tune_policy": "edgert.expert_tuning",
    "verify_pack": "edgert.storage.pack_verify",
    "warmup": "edgert.opening",
    "write_routing": "edgert.routing",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'edgert' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def bundled_model() -> Path:
    """Path of the small story model that comes with edgert, used when no model is named.

    Raises `ModelError` when this copy of edgert was installed without it.
    """
    # find_spec gives the folder without importing edgert.models, which would load the kernels.
    spec = importlib.util.find_spec("edgert.models")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for path in sorted(Path(folder, "demo").glob("*.gguf")):
            return path
    raise ModelError("this copy of edgert has no bundled model; name a GGUF file")
