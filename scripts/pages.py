#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The documentation as a site (`make docs`): build/site, from docs/, the pages of the root, and what the code knows.

Pages are gathered in build/docs, with links that lead out of them turned into what they name; then MkDocs builds the
site and fails for any link or anchor that leads nowhere.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

import reference
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

from mfsd.ground.metrics import METRICS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ROOT: Final = Path(__file__).resolve().parent.parent
PAGES: Final = ROOT / "build" / "docs"
OUT: Final = ROOT / "build" / "site"
OF_ROOT: Final = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "reporting.md",
}
"""Pages of the root, and what they are called on the site."""
_LINK: Final = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_FENCE: Final = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


# --- pages that are there ---------------------------------------------------------------------------------------------


def place(path: PurePosixPath) -> PurePosixPath | None:
    """Where a file of the repository is on the site; None: nowhere."""
    if path.parts and path.parts[0] == "docs":
        return path.relative_to("docs")
    name = OF_ROOT.get(str(path))
    return None if name is None else PurePosixPath(name)


def relinked(text: str, source: PurePosixPath) -> str:
    """A page of the repository with its links as they are on the site; code stays as it is."""
    here = place(source)
    assert here is not None  # noqa: S101 - only pages of the site are asked for

    def link(found: re.Match[str]) -> str:
        bang, words, target = found.groups()
        file, hash_, anchor = target.partition("#")
        if re.match(r"\w+:", target) or not file:
            return found[0]
        there = place(PurePosixPath(_normal(source.parent / file)))
        if there is None:
            return f"`{_normal(source.parent / file)}`"
        up = len(here.parts) - 1
        return f"{bang}[{words}]({'../' * up}{there}{hash_}{anchor})"

    pieces = _FENCE.split(text)
    return "".join(p if p.startswith("`") else _LINK.sub(link, p) for p in pieces)


def _normal(path: PurePosixPath) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def gather() -> None:
    """All pages in build/docs."""
    shutil.rmtree(PAGES, ignore_errors=True)
    sources = [*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in OF_ROOT)]
    for path in sources:
        source = PurePosixPath(path.relative_to(ROOT).as_posix())
        target = PAGES / str(place(source))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(relinked(path.read_text(), source))
    shutil.copytree(ROOT / "docs" / "pictures", PAGES / "pictures")
    for name, text in generated().items():
        (PAGES / "reference").mkdir(exist_ok=True)
        (PAGES / "reference" / name).write_text(text)
    (PAGES / "limits.md").write_text(limits())


# --- pages that the code knows ----------------------------------------------------------------------------------------


def limits() -> str:
    """What mfsd can't do, as the README and the architecture say."""
    out = ["# Limits"]
    for name in ("README.md", "docs/architecture.md"):
        text = (ROOT / name).read_text()
        begin = text.index("\n## What it can't do\n" if name == "README.md" else "\n## What mfsd can't do\n")
        section = text[begin + 1 :]
        section = section[: section.find("\n## ", 1)] if "\n## " in section[1:] else section
        out.append(relinked(section.partition("\n")[2].strip(), PurePosixPath(name)))
    return "\n\n".join(out) + "\n"


def generated() -> dict[str, str]:
    """Reference pages by name."""
    pages = {name: make() for name, make in reference.PAGES.items()}
    out = {
        f"{name}.md": f"# {page.name}\n\n*{page.what.capitalize()}.*\n\n{_escaped(page.body)}\n"
        for name, page in pages.items()
    }
    out["metrics.md"] = metrics()
    for name in ("hints", "control"):
        out[f"api-{name}.md"] = api(name)
    out["versions.md"] = versions()
    return out


def _escaped(body: str) -> str:
    """Angle brackets outside of code are no HTML."""
    pieces = _FENCE.split(body)
    return "".join(p if p.startswith("`") else p.replace("<", "&lt;") for p in pieces)


def metrics() -> str:
    """Every metric, from mfsd/ground/metrics.py."""
    lines = [
        "# Metrics", "",
        "As `[metrics]` serves them and `mfsctl stats` prints them. `packaging/monitoring` has a dashboard and alerts.",
        "",
        "| metric | kind | labels | what |", "|---|---|---|---|",
    ]  # fmt: skip
    for m in METRICS:
        labels = ", ".join(f"`{label}`" for label in m.labels)
        lines.append(f"| `{m.full_name}` | {m.kind} | {labels} | {m.what.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def versions() -> str:
    """What the tests ran with, from scripts/constraints.txt; kernels have a page of their own."""
    pinned = [line.strip().partition("==") for line in (ROOT / "scripts" / "constraints.txt").read_text().splitlines()]
    rows = [f"| {name} | {version} |" for name, sep, version in pinned if sep]
    return "\n".join([
        "# Tested versions", "",
        "The package is tried in fresh Debian 12 and 13 with a real systemd (`make test-deb`, `make test-systemd`);",
        "[kernels](../kernels.md) says what runs on which kernel. The tests run with these Python packages;",
        "`pyproject.toml` says which others are allowed.", "",
        "| package | version |", "|---|---|", *rows, "",
    ])  # fmt: skip


# --- the wire format --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Comments:
    """Comments of a .proto by path (SourceCodeInfo.Location.path, descriptor.proto)."""

    known: dict[tuple[int, ...], str]
    head: str

    @classmethod
    def of(cls, file: descriptor_pb2.FileDescriptorProto) -> _Comments:
        known, head = {}, ""
        for at in file.source_code_info.location:
            text = at.leading_comments or at.trailing_comments
            known[tuple(at.path)] = " ".join(text.split())
            if tuple(at.path) == (12,):  # the syntax statement, before which the file's own comment stands
                head = "\n".join(line.removeprefix(" ") for line in text.splitlines())
        return cls(known, head)

    def __call__(self, *path: int) -> str:
        return self.known.get(path, "").replace("|", "\\|").replace("<", "&lt;")


def api(name: str) -> str:
    """A page of a .proto: services, messages with their fields, enums."""
    file = next(f for f in _descriptors() if f.name == f"mfsd/v1/{name}.proto")
    comments = _Comments.of(file)
    out = [f"# {name.capitalize()} API", f"`proto/{file.name}`, package `{file.package}`."]
    if comments.head:
        out.append(comments.head.partition("\n\n")[2].strip() or comments.head.strip())
    for s, service in enumerate(file.service):
        out.append(f"## Service {service.name}\n\n{comments(6, s)}")
        rows = [
            f"| `{m.name}` | {'stream of ' if m.client_streaming else ''}{_type(m.input_type)} | "
            f"{'stream of ' if m.server_streaming else ''}{_type(m.output_type)} | {comments(6, s, 2, i)} |"
            for i, m in enumerate(service.method)
        ]
        out.append("| call | takes | gives | |\n|---|---|---|---|\n" + "\n".join(rows))
    for i, message in enumerate(file.message_type):
        out += _message(message, comments, (4, i))
    for i, enum in enumerate(file.enum_type):
        rows = [f"| `{v.name}` | {v.number} | {comments(5, i, 2, n)} |" for n, v in enumerate(enum.value)]
        out.append(f"## {enum.name}\n\n{comments(5, i)}")
        out.append("| value | number | |\n|---|---|---|\n" + "\n".join(rows))
    return "\n\n".join(p for p in out if p) + "\n"


def _message(
    message: descriptor_pb2.DescriptorProto, comments: _Comments, path: tuple[int, ...], outer: str = ""
) -> Iterator[str]:
    if message.options.map_entry:
        return
    name = f"{outer}{message.name}"
    yield f"## {name}\n\n{comments(*path)}"
    if message.field:
        rows = [
            f"| `{f.name}` | {_kind(f, message)} | {f.number} | {comments(*path, 2, n)} |"
            for n, f in enumerate(message.field)
        ]
        yield "| field | type | number | |\n|---|---|---|---|\n" + "\n".join(rows)
    for n, inner in enumerate(message.nested_type):
        yield from _message(inner, comments, (*path, 3, n), f"{name}.")


def _kind(f: descriptor_pb2.FieldDescriptorProto, message: descriptor_pb2.DescriptorProto) -> str:
    proto = descriptor_pb2.FieldDescriptorProto
    name = _type(f.type_name) if f.type_name else proto.Type.Name(f.type).removeprefix("TYPE_").lower()
    entry = next((n for n in message.nested_type if n.options.map_entry and f.type_name.endswith(f".{n.name}")), None)
    if entry is not None:
        key, value = (_kind(x, entry) for x in entry.field)
        return f"map of {key} to {value}"
    if f.label == proto.LABEL_REPEATED:
        return f"list of {name}"
    if f.proto3_optional:
        return f"{name}, may be absent"
    if f.HasField("oneof_index"):
        return f"{name}, one of *{message.oneof_decl[f.oneof_index].name}*"
    return name


def _type(name: str) -> str:
    """Name of a message or enum without its package."""
    return f"`{name.removeprefix('.mfsd.v1.').removeprefix('.')}`"


def _descriptors() -> Iterable[descriptor_pb2.FileDescriptorProto]:
    target = ROOT / "build" / "descriptors.pb"
    target.parent.mkdir(exist_ok=True)
    well_known = str(Path(protoc.__file__).parent / "_proto")
    files = [str(p.relative_to(ROOT / "proto")) for p in sorted((ROOT / "proto").rglob("*.proto"))]
    argv = ["protoc", f"-I{ROOT / 'proto'}", f"-I{well_known}", "--include_source_info",
            f"--descriptor_set_out={target}", *files]  # fmt: skip
    if protoc.main(argv):
        raise SystemExit("protoc failed")
    return descriptor_pb2.FileDescriptorSet.FromString(target.read_bytes()).file


def main() -> None:
    """Gather the pages and build the site."""
    gather()
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", str(ROOT / "mkdocs.yml")]
    done = subprocess.run(argv, check=False, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    if done.returncode:
        raise SystemExit(done.returncode)
    print(f"docs: {OUT.relative_to(ROOT)}/index.html")


if __name__ == "__main__":
    main()
