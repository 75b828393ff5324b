# SPDX-License-Identifier: Apache-2.0
"""Compile the classifier with BCC and print it as JSON: a program of its own, run by the BCC loader.

A process of its own, for three reasons: it is run by the distribution's interpreter, to which BCC's bindings belong;
LLVM's 150 MB of memory go with it; and what the compiler says can be caught. Uses nothing of mfsd and no newer Python
than Ubuntu 22.04's.

    python3 -I bcc_compile.py SOURCE INCLUDE PROGRAM

BCC makes the maps of the source and puts their descriptors into the instructions. We print which instruction refers to
which map, and the loader puts its own descriptors there.
"""

import ctypes
import json
import re
import struct
import sys

LOAD_64 = 0x18
"""BPF_LD | BPF_IMM | BPF_DW; with source register 1 (BPF_PSEUDO_MAP_FD) it loads a map."""


def main(source: str, include: str, program: str) -> None:
    """Print {"code": hexadecimal instructions, "licence": text, "maps": {name: properties and uses}}."""
    from bcc import BPF, lib  # noqa: PLC0415 - so that a missing module is a message and not a traceback of ours

    with open(source) as file:  # noqa: PTH123 - this module stays with what every Python 3 has
        text = file.read()
    # BCC rewrites calls of a map's functions, but not those that come out of a macro.
    text = re.sub(r"\bMFSD_LOOKUP\((\w+),\s*", r"\1.lookup(", text)
    # BCC's own typedefs come from the kernel's headers, whose warnings are not ours.
    module = BPF(text=text, cflags=["-I" + include, "-w"])
    name = program.encode()
    start = lib.bpf_function_start(module.module, name)
    size = lib.bpf_function_size(module.module, name)
    code = bytearray(ctypes.string_at(start, size))
    lib.bpf_table_name.restype = ctypes.c_char_p
    lib.bpf_table_key_size_id.restype = lib.bpf_table_leaf_size_id.restype = ctypes.c_size_t
    for function in (lib.bpf_table_name, lib.bpf_table_key_size_id, lib.bpf_table_leaf_size_id, lib.bpf_table_fd_id):
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    lib.bpf_num_tables.argtypes = [ctypes.c_void_p]
    maps = {}
    for i in range(lib.bpf_num_tables(module.module)):
        maps[lib.bpf_table_fd_id(module.module, i)] = {
            "name": lib.bpf_table_name(module.module, i).decode(),
            "type": lib.bpf_table_type_id(module.module, i),
            "key_size": lib.bpf_table_key_size_id(module.module, i),
            "value_size": lib.bpf_table_leaf_size_id(module.module, i),
            "entries": lib.bpf_table_max_entries_id(module.module, i),
            "flags": lib.bpf_table_flags_id(module.module, i),
            "uses": [],
        }
    at = 0
    while at < size:
        op, registers, _, value = struct.unpack_from("=BBhi", code, at)
        if op == LOAD_64:
            if registers >> 4 == 1:
                maps[value]["uses"].append(at // 8)
            at += 8  # its second half
        at += 8
    licence = lib.bpf_module_license(module.module) or b"GPL"
    print(json.dumps({"code": code.hex(), "licence": licence.decode(), "maps": list(maps.values())}))  # noqa: T201 - our answer


if __name__ == "__main__":
    main(*sys.argv[1:4])
