# SPDX-License-Identifier: Apache-2.0
"""The classifier through libbpf 1.x and ctypes: no compiler, no kernel headers, a few milliseconds.

libbpf opens and loads the object file; what comes after goes by bpf(2) itself (syscall.py).

No callback is ever handed to C: ctypes makes callbacks executable memory at run time, which systemd's
MemoryDenyWriteExecute forbids. libbpf's messages are silenced by a NULL print function (libbpf.c, libbpf_print), and
the verifier's log comes through a buffer.

Declarations follow <bpf/libbpf.h> of libbpf 1.0. Its "opts" structs carry their own size, and newer libraries accept
older, shorter ones.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import platform
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from mfsd.datapath.bpf import loader, syscall
from mfsd.datapath.bpf.loader import PROGRAM, Classifier, own_copy
from mfsd.datapath.errors import LoaderError

if TYPE_CHECKING:
    from collections.abc import Mapping

LIBRARY: Final = "libbpf.so.1"
OLDEST_KERNEL: Final = (5, 11)
"""bpf_ktime_get_coarse_ns()."""

_NO_VERDICT: Final = re.compile(r"processed |\d+: |; |from \d|\s|.*:$|$")
"""Statistics, instructions, source lines; and since 7.3 explanations below the verdict, indented and with headings."""
_LOG_BYTES: Final = 4 << 20
NAME_BYTES: Final = 16
"""TCP_CA_NAME_MAX, and the kernel's names of programs and maps."""
_F_LINK: Final = 1 << 13
"""BPF_F_LINK, include/uapi/linux/bpf.h."""
_STRUCT_OPS: Final = 44
"""enum bpf_attach_type, since Linux 6.4."""


class _OpenOpts(ctypes.Structure):
    """struct bpf_object_open_opts."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("object_name", ctypes.c_char_p),
        ("relaxed_maps", ctypes.c_bool),
        ("pin_root_path", ctypes.c_char_p),
        ("was_attach_prog_fd", ctypes.c_uint32),  # removed from the struct, its place is kept
        ("kconfig", ctypes.c_char_p),
        ("btf_custom_path", ctypes.c_char_p),
        ("kernel_log_buf", ctypes.c_void_p),
        ("kernel_log_size", ctypes.c_size_t),
        ("kernel_log_level", ctypes.c_uint32),
    )


_INT, _U32, _PTR, _STR = ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_char_p
_PROTOTYPES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "libbpf_set_print": (_PTR, (_PTR,)),
    "bpf_object__open_file": (_PTR, (_STR, _PTR)),
    "bpf_object__open_mem": (_PTR, (_STR, ctypes.c_size_t, _PTR)),
    "bpf_object__load": (_INT, (_PTR,)),
    "bpf_object__close": (None, (_PTR,)),
    "bpf_object__find_map_by_name": (_PTR, (_PTR, _STR)),
    "bpf_object__find_program_by_name": (_PTR, (_PTR, _STR)),
    "bpf_map__fd": (_INT, (_PTR,)),
    "bpf_map__key_size": (_U32, (_PTR,)),
    "bpf_map__value_size": (_U32, (_PTR,)),
    "bpf_map__set_max_entries": (_INT, (_PTR, _U32)),
    "bpf_map__reuse_fd": (_INT, (_PTR, _INT)),
    "bpf_map__set_map_flags": (_INT, (_PTR, _U32)),
    "bpf_map__attach_struct_ops": (_PTR, (_PTR,)),
    "bpf_link__fd": (_INT, (_PTR,)),
    "bpf_link__disconnect": (None, (_PTR,)),
    "bpf_link__destroy": (_INT, (_PTR,)),
    "bpf_program__fd": (_INT, (_PTR,)),
}


@functools.cache
def library() -> Any:
    """Return libbpf with the prototypes that we use. Raises LoaderError when it isn't installed or too old."""
    try:
        lib = ctypes.CDLL(LIBRARY, use_errno=True)
    except OSError as e:
        raise LoaderError(
            LIBRARY,
            str(e),
            "install libbpf 1.0 or newer (Debian 12, Ubuntu 24.04: package libbpf1), or use the BCC loader",
        ) from e
    for name, (restype, argtypes) in _PROTOTYPES.items():
        try:
            function = getattr(lib, name)
        except AttributeError as e:
            raise LoaderError(LIBRARY, f"has no {name}", "install libbpf 1.0 or newer") from e
        function.restype, function.argtypes = restype, argtypes
    lib.libbpf_set_print(None)
    return lib


def _checked(code: int) -> int:
    """Turn libbpf's negative errno into OSError."""
    if code < 0:
        raise OSError(-code, os.strerror(-code))
    return code


class LibbpfLoader:
    """Loads the object that the build left in mfsd/datapath/_bpf (see ``loader.Loader``).

    Raises LoaderError where libbpf is missing or too old.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or object_path("classifier")
        library()  # missing: say so now, not at the first device

    def open_classifier(self, slots: int, share: Classifier | None = None) -> Classifier:
        """Load the classifier with a table of ``slots`` rows, or with the tables of ``share``. Raises LoaderError."""
        check_kernel(platform.release())
        loader.check_rows(slots, share)
        with BpfObject(self.path) as obj:
            for name in (*loader.SHARED_MAPS, *loader.DEVICE_MAPS):
                loader.check_sizes(name, *obj.map_sizes(name))
                if share is not None and name in loader.SHARED_MAPS:
                    obj.reuse_map(name, share.map_fds[name])
                elif name in loader.RESIZED:
                    obj.resize_map(name, slots)
            obj.load()
            fds = {name: obj.map_fd(name) for name in (*loader.SHARED_MAPS, *loader.DEVICE_MAPS)}
            return Classifier(obj.program_fd(PROGRAM), fds, rows=slots)


def verdict(log: str) -> str:
    """The line of the verifier's log that says why it refuses a program."""
    lines = [line for line in log.splitlines() if not _NO_VERDICT.match(line)]
    return lines[-1] if lines else "the verifier left no log"


class BpfObject:
    """A BPF ELF file on its way into the kernel. Descriptors taken from it are the caller's own."""

    def __init__(self, path: Path, names: Mapping[str, str] | None = None) -> None:
        """``names``: words to put in place of others, where the object has these alone in NAME_BYTES bytes."""
        self._lib = library()
        self._path = path
        self._log = mmap.mmap(-1, _LOG_BYTES)  # touched only if the verifier speaks
        self._log_buf = (ctypes.c_char * _LOG_BYTES).from_buffer(self._log)
        opts = _OpenOpts(sz=ctypes.sizeof(_OpenOpts), kernel_log_size=_LOG_BYTES)
        opts.kernel_log_buf = ctypes.addressof(self._log_buf)
        self._image = b""
        self._obj: int | None = None
        if names is None:
            self._obj = self._lib.bpf_object__open_file(os.fsencode(path), ctypes.byref(opts))
        else:
            self._image = path.read_bytes()
            for old, new in names.items():
                self._image = self._image.replace(_name(old), _name(new))
            opts.object_name = path.name.split(".")[0].encode()
            self._obj = self._lib.bpf_object__open_mem(self._image, len(self._image), ctypes.byref(opts))
        if not self._obj:
            e = ctypes.get_errno()
            raise LoaderError(
                f"BPF object {path}",
                os.strerror(e),
                "run scripts/build.py, or reinstall mfsd" if e == errno.ENOENT else "",
            )

    def load(self) -> None:
        """Make the maps and have the program verified. Raises LoaderError."""
        code = self._lib.bpf_object__load(self._obj)
        if code < 0:
            raise self._explain(-code)

    def _explain(self, code: int) -> LoaderError:
        """Say what the kernel didn't like and what to do about it."""
        log = self._log[: max(self._log.find(b"\0"), 0)].decode(errors="replace").strip()
        what, cause = f"loading {self._path.name}", os.strerror(code)
        if code in (errno.EPERM, errno.EACCES) and not log:
            fix = "mfsd needs CAP_BPF and CAP_NET_ADMIN (AmbientCapabilities= in the unit), and no lockdown of bpf(2)"
            return LoaderError(what, cause, fix)
        if code == errno.ENOMEM:
            return LoaderError(what, cause, "choose fewer slots, or give the service a higher memory limit")
        if code in (errno.ENOSYS, errno.EOPNOTSUPP):
            return LoaderError(what, cause, "the kernel lacks CONFIG_BPF_SYSCALL or CONFIG_NET_CLS_ACT")
        fix = f"kernel {platform.release()} rejects the program; report this with the log"
        return LoaderError(what, f"{cause} ({verdict(log)})", fix, log)

    def map_sizes(self, name: str) -> tuple[int, int]:
        """Bytes of key and value of a map."""
        m = self._map(name)
        return self._lib.bpf_map__key_size(m), self._lib.bpf_map__value_size(m)

    def resize_map(self, name: str, entries: int) -> None:
        """Set the number of elements before loading."""
        _checked(self._lib.bpf_map__set_max_entries(self._map(name), entries))

    def reuse_map(self, name: str, fd: int) -> None:
        """Use a map that exists instead of making one."""
        _checked(self._lib.bpf_map__reuse_fd(self._map(name), fd))

    def link_map(self, name: str) -> None:
        """Have a struct_ops map registered by a link, before loading (Linux 6.4)."""
        _checked(self._lib.bpf_map__set_map_flags(self._map(name), _F_LINK))

    def register(self, name: str) -> int:
        """Register a loaded struct_ops map; the descriptor of its link, the caller's own. Raises OSError.

        libbpf makes the link itself since 1.2; before that it only fills in the map.
        """
        attached = self._lib.bpf_map__attach_struct_ops(self._map(name))
        if not attached:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        fd, own = self._lib.bpf_link__fd(attached), self._lib.bpf_map__fd(self._map(name))
        self._lib.bpf_link__disconnect(attached)  # what is freed next then closes and takes off nothing
        self._lib.bpf_link__destroy(attached)
        return syscall.link_create(own, 0, _STRUCT_OPS, 0) if fd == own else int(fd)

    def map_fd(self, name: str) -> int:
        """Descriptor of a loaded map, the caller's own."""
        return own_copy(_checked(self._lib.bpf_map__fd(self._map(name))))

    def program_fd(self, name: str) -> int:
        """Descriptor of a loaded program, the caller's own."""
        program = self._lib.bpf_object__find_program_by_name(self._obj, name.encode())
        if not program:
            raise LoaderError(f"BPF object {self._path}", f"has no program {name}", "run scripts/build.py")
        return own_copy(_checked(self._lib.bpf_program__fd(program)))

    def _map(self, name: str) -> int:
        found: int | None = self._lib.bpf_object__find_map_by_name(self._obj, name.encode())
        if not found:
            raise LoaderError(f"BPF object {self._path}", f"has no map {name}", "run scripts/build.py")
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._lib.bpf_object__close(self._obj)
        self._obj = None
        del self._log_buf
        self._log.close()


def _name(word: str) -> bytes:
    return word.encode().ljust(NAME_BYTES, b"\0")


def object_path(name: str) -> Path:
    """Where the build left a BPF object."""
    return Path(str(resources.files("mfsd.datapath"))) / "_bpf" / f"{name}.bpf.o"


def check_kernel(release: str) -> None:
    """Refuse kernels that lack what the classifier calls. Raises LoaderError."""
    found = re.match(r"(\d+)\.(\d+)", release)
    if found and (int(found[1]), int(found[2])) < OLDEST_KERNEL:
        need = ".".join(map(str, OLDEST_KERNEL))
        raise LoaderError("classifier", f"kernel {release} is too old", f"it needs Linux {need} or newer")
