"""How often a model's own drafts were right, kept from one run to the next.

Owns: the file of a model and width of base. Must not know what is done with it. A file that cannot
be read, or holds nonsense, counts as none; one that cannot be written is not kept. With
`EDGERT_ACCEPTANCE` set to "off" nothing is read or kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from edgert.draft_forecast import draft_bits
from edgert.kept_files import keep_file, prune_files
from edgert.kernels_cpu.cache import cache_root
from edgert.plan import Plan
from edgert.self_draft import self_acceptance
from edgert.speculation import Acceptance

__all__ = ["load_acceptance", "save_acceptance"]

ENVIRONMENT = "EDGERT_ACCEPTANCE"
_ENOUGH = 50.0  # tokens verified before something is worth keeping
_MOST_FILES = 64  # of half a KiB


def acceptance_path(files: Sequence[Path], plan: Plan) -> Path:
    """The file for a model, by name and size, and its bits in memory to a half. Raises OSError."""
    width = round(2 * draft_bits(plan)) / 2
    parts = [files[0].name, *(str(os.stat(file).st_size) for file in files), str(width)]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    return cache_root().parent / "acceptance" / f"{key}.json"


def load_acceptance(files: Sequence[Path], plan: Plan) -> Acceptance:
    """What is known of drafts, or what is assumed."""
    found = self_acceptance()
    if plan.can_draft and _is_on():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found.restore(json.loads(acceptance_path(files, plan).read_text(encoding="utf-8")))
    return found


def save_acceptance(files: Sequence[Path], plan: Plan, known: Acceptance) -> None:
    """Keep what was learnt, if it is enough."""
    if not (plan.can_draft and known.learnt >= _ENOUGH and _is_on()):
        return
    with contextlib.suppress(OSError):
        path = acceptance_path(files, plan)
        if keep_file(path, json.dumps(known.state()).encode()):
            prune_files(path.parent, _MOST_FILES)


def _is_on() -> bool:
    return os.environ.get(ENVIRONMENT) != "off"
