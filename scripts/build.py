#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Generate what is generated: protobuf code, the BPF object, and the Python view of its layouts.

Outputs (all git-ignored, all rebuilt when an input is newer):

    mfsd/v1/                                  from proto/
    mfsd/datapath/_bpf/*.bpf.o                from bpf/ (clang; UAPI headers only, so the object is portable)
    mfsd/datapath/_bpf/src/                   a copy of bpf/ for the BCC loader, which compiles on the target
    mfsd/datapath/_abi.py                     numpy dtypes and constants, from the BTF of bpf/abi.c

Run by `make build` and by the wheel build (hatch_build.py). Needs clang, llvm-strip, bpftool, libbpf headers.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gen"
PROTOS = ["mfsd/v1/hints.proto", "mfsd/v1/control.proto"]
ABI_STRUCTS = [
    "mfsd_slot", "mfsd_tuple", "mfsd_host", "mfsd_band_map", "mfsd_dev", "mfsd_counter",
    "mfsd_owner", "mfsd_sock", "mfsd_event", "mfsd_rule", "mfsd_rules_of",
    "mfsd_yield", "mfsd_path_key", "mfsd_peer_clock", "mfsd_path", "mfsd_far", "mfsd_adopted",
]  # fmt: skip
ABI_ENUMS = [
    "mfsd_consts", "mfsd_host_flags", "mfsd_dev_flags", "mfsd_slot_flags", "mfsd_stat", "mfsd_event_kind",
    "mfsd_event_flags", "mfsd_yield_class", "mfsd_yield_flags",
]  # fmt: skip


def tool(name: str, package: str) -> str:
    """Path of a build tool; says which Debian package to install when it is missing."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        sys.exit(f"build: {name} not found; install the Debian package {package} (or run `make setup`)")
    return path


def stale(outputs: list[Path], inputs: list[Path]) -> bool:
    """True when an output is missing or older than an input."""
    if not all(o.exists() for o in outputs):
        return True
    return min(o.stat().st_mtime for o in outputs) < max(i.stat().st_mtime for i in inputs)


def run(*argv: str | Path) -> bytes:
    """Run a tool, show what it says on failure."""
    proc = subprocess.run([str(a) for a in argv], check=False, capture_output=True)
    if proc.returncode:
        sys.exit(f"build: {' '.join(str(a) for a in argv)}\n{proc.stderr.decode()}")
    return proc.stdout


def build_proto() -> None:
    """Compile proto/ into mfsd/v1 with the protoc that grpcio-tools carries."""
    inputs = [ROOT / "proto" / p for p in PROTOS] + [Path(__file__)]
    outputs = [ROOT / p.replace(".proto", s) for p in PROTOS for s in ("_pb2.py", "_pb2_grpc.py", "_pb2.pyi")]
    if not stale(outputs, inputs):
        return
    package = ROOT / "mfsd" / "v1"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").touch()
    import google.rpc
    import grpc_tools

    googleapis = Path(next(iter(google.rpc.__path__))).parents[1]
    env_path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ["PATH"] = env_path  # the mypy plugins live beside the interpreter
    run(
        sys.executable, "-m", "grpc_tools.protoc",
        f"-I{ROOT / 'proto'}", f"-I{Path(grpc_tools.__file__).parent / '_proto'}", f"-I{googleapis}",
        f"--python_out={ROOT}", f"--grpc_python_out={ROOT}",
        f"--mypy_out=quiet:{ROOT}", f"--mypy_grpc_out=quiet:{ROOT}",
        *PROTOS,
    )  # fmt: skip
    print("build: protobuf -> mfsd/v1")


def compile_bpf(source: Path, output: Path) -> None:
    """Compile one BPF C file. Debian keeps asm/ under the multiarch folder, hence the second -I."""
    multiarch = sysconfig.get_config_var("MULTIARCH") or f"{os.uname().machine}-linux-gnu"
    run(
        tool("clang", "clang"), "-O2", "-g", "-Wall", "-Werror", "-target", "bpf", "-mcpu=v3",
        f"-ffile-prefix-map={ROOT}=.",  # BTF names source files: the same object wherever it was built
        f"-I{ROOT / 'bpf'}", f"-I/usr/include/{multiarch}", "-c", source, "-o", output,
    )  # fmt: skip
    run(tool("llvm-strip", "llvm"), "-g", output)


def build_bpf() -> None:
    """Compile every bpf/*.bpf.c and copy the sources for BCC."""
    sources = sorted((ROOT / "bpf").glob("*.bpf.c"))
    headers = sorted((ROOT / "bpf").glob("*.h"))
    out = ROOT / "mfsd" / "datapath" / "_bpf"
    outputs = [out / s.name.replace(".c", ".o") for s in sources]
    copies = [out / "src" / p.name for p in [*sources, *headers]]
    if not stale([*outputs, *copies], [*sources, *headers, Path(__file__)]):
        return
    (out / "src").mkdir(parents=True, exist_ok=True)
    for source, output in zip(sources, outputs, strict=True):
        compile_bpf(source, output)
    for path in [*sources, *headers]:
        shutil.copy(path, out / "src" / path.name)
    print(f"build: {', '.join(o.name for o in outputs)} -> mfsd/datapath/_bpf")


class Btf:
    """The few questions we ask of `bpftool btf dump -j`."""

    def __init__(self, obj: Path) -> None:
        dump = json.loads(run(tool("bpftool", "bpftool"), "-j", "btf", "dump", "file", obj))
        self.types: dict[int, dict[str, Any]] = {t["id"]: t for t in dump["types"]}
        self.named = {(t["kind"], t["name"]): t for t in dump["types"]}

    def resolve(self, type_id: int) -> dict[str, Any]:
        """Follow typedefs and qualifiers."""
        t = self.types[type_id]
        while t["kind"] in ("TYPEDEF", "CONST", "VOLATILE"):
            t = self.types[t["type_id"]]
        return t

    def dtype(self, type_id: int) -> str:
        """Python source of the numpy dtype of a type."""
        t = self.resolve(type_id)
        if t["kind"] == "INT":
            return f'"{"i" if "SIGNED" in str(t.get("encoding")) else "u"}{t["size"]}"'
        if t["kind"] == "ENUM":
            return f'"u{t["size"]}"'
        if t["kind"] == "ARRAY":
            return f"({self.dtype(t['type_id'])}, ({t['nr_elems']},))"
        if t["kind"] == "STRUCT":
            return self.name(t["name"])
        raise ValueError(f"no numpy dtype for BTF kind {t['kind']} of {t.get('name')}")

    @staticmethod
    def name(struct: str) -> str:
        """mfsd_slot -> SLOT_DTYPE."""
        return struct.removeprefix("mfsd_").upper() + "_DTYPE"


def build_abi() -> None:
    """Write mfsd/datapath/_abi.py from the BTF of bpf/abi.c."""
    inputs = [ROOT / "bpf" / "abi.c", ROOT / "bpf" / "mfsd.h", Path(__file__)]
    output = ROOT / "mfsd" / "datapath" / "_abi.py"
    if not stale([output], inputs):
        return
    BUILD.mkdir(parents=True, exist_ok=True)
    obj = BUILD / "abi.o"
    compile_bpf(inputs[0], obj)
    btf = Btf(obj)
    lines = [
        '"""Layouts and constants of bpf/mfsd.h. Generated by scripts/build.py from BTF; do not edit."""',
        "",
        "from typing import Any, Final",
        "",
        "import numpy as np",
        "",
    ]
    for enum in ABI_ENUMS:
        t = btf.named["ENUM", enum]
        # bpftool prints values of 2^31 and more as negative numbers of 64 bits.
        mask = (1 << 8 * t["size"]) - 1
        lines += [f"{v['name'].removeprefix('MFSD_')}: Final = {v['val'] & mask}" for v in t["values"]]
        lines.append("")
    for struct in ABI_STRUCTS:  # those that contain others come after them
        t = btf.named["STRUCT", struct]
        members = t["members"]
        lines += [
            f"{btf.name(struct)}: Final[np.dtype[Any]] = np.dtype(",
            "    {",
            '        "names": [',
            *[f'            "{m["name"]}",' for m in members],
            "        ],",
            f'        "formats": [{", ".join(btf.dtype(m["type_id"]) for m in members)}],',
            f'        "offsets": {[m["bits_offset"] // 8 for m in members]},',
            f'        "itemsize": {t["size"]},',
            "    }",
            ")",
            "",
        ]
    output.write_text("\n".join(lines))
    print("build: BTF of bpf/mfsd.h -> mfsd/datapath/_abi.py")


def main() -> None:
    """Build everything that is out of date."""
    build_proto()
    build_abi()
    build_bpf()


if __name__ == "__main__":
    main()
