"""The report of `edgert stress` as a document: Markdown, or HTML with its pictures inside.

Owns: the order of the parts and the two forms. Must not know how figures come about.
"""

from __future__ import annotations

import html
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import edgert
from edgert import format_bytes
from edgert.cli.report import atomic_file

__all__ = ["Document", "Part", "machine_facts", "write_document"]

_STYLE = (
    "body{font:14px sans-serif;margin:2em;max-width:100em}table{border-collapse:collapse}"
    "td,th{padding:.15em .6em;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}"
    "td:first-child,th:first-child{text-align:left}.bad{color:#b00}"
)


@dataclass(frozen=True, slots=True)
class Part:
    """A heading with lines, a table and pictures (SVG) below it, each of them perhaps empty."""

    title: str
    lines: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    pictures: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """The verdict, and what it rests on."""

    verdict: str
    parts: list[Part] = field(default_factory=list)

    def markdown(self) -> str:
        """For people and version control; without pictures."""
        out = ["# edgert stress", "", f"**{self.verdict}**", ""]
        for part in self.parts:
            if not part.lines and not part.rows:  # pictures alone
                continue
            out += [f"## {part.title}", ""]
            out += [f"* {line}" for line in part.lines] + ([""] if part.lines else [])
            if part.rows:
                out.append("| " + " | ".join(part.header) + " |")
                out.append("| --- " * len(part.header) + "|")
                out += ["| " + " | ".join(row) + " |" for row in part.rows] + [""]
        return "\n".join(out)

    def html(self) -> str:
        """One file that needs no other."""
        bad = ' class="bad"' if self.verdict.startswith("broken") else ""
        out = [
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>edgert stress</title>'
            f"<style>{_STYLE}</style><h1>edgert stress</h1>"
            f"<p{bad}><b>{html.escape(self.verdict)}</b></p>"
        ]
        for part in self.parts:
            out.append(f"<h2>{html.escape(part.title)}</h2>")
            if part.lines:
                items = "".join(f"<li>{html.escape(line)}</li>" for line in part.lines)
                out.append(f"<ul>{items}</ul>")
            if part.rows:
                head = "".join(f"<th>{html.escape(cell)}</th>" for cell in part.header)
                body = "".join(
                    "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
                    for row in part.rows
                )
                out.append(f"<table><tr>{head}</tr>{body}</table>")
            out += list(part.pictures)
        return "\n".join([*out, "</html>"])


def write_document(path: Path, document: Document) -> None:
    """Write it in the form that the name ends in: `.html`, else Markdown."""
    web = path.suffix.lower() in (".html", ".htm")
    with atomic_file(path) as stream:
        stream.write((document.html() if web else document.markdown()).encode())


def machine_facts() -> list[str]:
    """What the figures were measured on."""
    import psutil

    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    memory = format_bytes(psutil.virtual_memory().total)
    return [
        f"{cpu}, {os.cpu_count()} cores, {memory} of memory",
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"edgert {edgert.__version__}",
    ]
