"""`edgert doctor`: the machine as edgert sees it, and what to do about what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import edgert
from edgert import format_bytes
from edgert.cli.options import debug_options, json_option, model_argument
from edgert.cli.report import print_json

__all__ = ["doctor", "doctor_text"]


@click.command()
@model_argument
@json_option
@debug_options
def doctor(model: Path | None, as_json: bool) -> None:
    """Look at the machine: CPU, threads, memory, disk, kernel cache.

    Measures how fast memory and the disk under MODEL are read, and shows the profile of the
    machine that plan predicts with. Ends with code 1 when something keeps edgert from working; a
    warning does not. Each problem comes with what to do.
    """
    facts = edgert.diagnose(model)
    if as_json:
        print_json(facts)
    else:
        click.echo(doctor_text(facts))
    if any(problem["severity"] == "error" for problem in facts["problems"]):
        click.get_current_context().exit(1)


def doctor_text(facts: dict[str, Any]) -> str:
    """`edgert.diagnose`'s facts for people: a line for each topic, then the problems."""
    versions, cpu, threads = facts["versions"], facts["cpu"], facts["threads"]
    memory, disk, cache = facts["memory"], facts["disk"], facts["cache"]
    limit = memory["cgroup_limit_bytes"]
    quota = threads["cpu_quota"]
    lines = {
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "cpu": cpu["name"],
        "features": " ".join(cpu.get("features", ())) or "none that the kernels use",
        "kernels": f"{cpu.get('variant', 'none')} variant",
        "threads": f"{threads['default']} of {threads['cores']} cores ({threads['from']}"
        + (f", quota {quota:.3g} cores)" if quota is not None else ")"),
        "memory": f"{format_bytes(memory['available_bytes'])} to use of "
        f"{format_bytes(memory['total_bytes'])}"
        + (f", control group limit {format_bytes(limit)}" if limit else ", no limit"),
        "memory rate": f"{_rate(memory['read_bytes_per_s'])}, one thread "
        f"{_rate(memory['read_bytes_per_s_one_thread'])}",
        "disk rate": f"{_rate(disk['read_bytes_per_s'])} under {disk['model']}"
        + ("" if disk.get("direct", True) else ", not direct"),
        "kernel cache": f"{cache['folder']}: {cache['current_kernels']} kernels of this version, "
        f"{cache['kernels'] - cache['current_kernels']} of {cache['stale_keys']} others, "
        f"{format_bytes(cache['bytes'])}" + ("" if cache["writable"] else ", not writable"),
    }
    lines |= _profile_lines(facts["profile"])
    if facts["experts"] is not None:
        lines["expert profile"] = _experts_line(facts["experts"])
    width = max(map(len, lines))
    text = [f"{name.ljust(width)}  {value}" for name, value in lines.items()]
    text.append("")
    for problem in facts["problems"]:
        text.append(f"{problem['severity']}: {problem['what']}\n  to do: {problem['do']}")
    if not facts["problems"]:
        text.append("no problems found")
    return "\n".join(text)


def _experts_line(found: dict[str, Any]) -> str:
    """What is known of the routing of the model."""
    if found["refused"]:
        return str(found["refused"])
    if found["file"] is None:
        return "turned off (EDGERT_EXPERT_PROFILE)"
    return f"{found['tokens']:.0f} tokens of earlier runs, in {found['file']}"


def _profile_lines(profile: dict[str, Any] | None) -> dict[str, str]:
    """What `edgert plan` predicts speeds with."""
    if profile is None:
        return {"profile": "not measured; `edgert plan` with this model does so"}
    reads = (
        f"{format_bytes(r['request_bytes'])} x {r['readers']} {r['bytes_per_s'] / 1e9:.2f}"
        for r in profile["reads"]
    )
    busy = f"{_rate(profile['busy_read_bytes_per_s'])} while all cores compute, which leaves them "
    lines = {
        "profile": profile["file"] or "measured now, and nowhere to keep it",
        "reads": f"{', '.join(reads)} GB/s",
        "reads, busy": f"{busy}{100 * profile['busy_memory_share']:.0f} % of memory's rate",
    }
    for name, rate in profile["kernels"].items():
        lines[f"kernel {name}"] = (
            f"a token {_rate(rate['token_bytes_per_s'])}, a prompt "
            f"{rate['batch_macs_per_s'] / 1e9:.0f} GMAC/s, repacking "
            f"{_rate(rate['repack_bytes_per_s'])} a thread"
        )
    return lines


def _rate(value: float | None) -> str:
    return "not measured" if value is None else f"{value / 1e9:.2f} GB/s"
