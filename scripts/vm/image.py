# SPDX-License-Identifier: Apache-2.0
"""The guest's disk and initial RAM disk, made of this machine's own files.

A guest that sees the host's file tree over 9p needs more than a minute for ``import numpy`` under emulation; from a
block device it takes seconds. So the interpreter, the virtual environment, the tools that tests call with their
libraries, the kernel's modules and headers, and a copy of the checkout are packed into one ext4 image, at the paths
that they have here. The copy is also why somebody can go on editing during a run.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import lzma
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kernels import Kernel

ROOT: Final = Path(__file__).resolve().parents[2]
_INIT_FILE: Final = Path(__file__).parent / "init.sh"
TOOLS: Final = (
    "bash", "sh", "cat", "ls", "sleep", "date", "env", "timeout", "dmesg", "mount", "umount", "kill", "mkdir", "ps",
    "true", "false", "sed", "grep", "awk", "hostname", "seq", "rm", "cp", "printf", "id", "touch",
    "ip", "tc", "bridge", "ss", "ethtool", "sysctl", "bpftool", "modprobe", "kmod", "insmod", "lsmod", "ping",
    "pgrep", "unshare", "ln", "uname", "cut", "sync", "df", "tar", "ldconfig", "find", "sort", "wc", "tr", "head",
    "xargs", "dirname", "basename", "readlink", "stat", "chmod", "mktemp", "test", "expr", "nproc",
    "nsenter", "setpriv", "busybox", "clang", "llvm-strip", "nstat", "tail",
)  # fmt: skip
FILES: Final = (
    "/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/iproute2", "/usr/share/iproute2", "/usr/lib/iproute2",
    "/usr/lib/tc", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/ld.so.cache", "/etc/protocols", "/etc/services",
    "/usr/lib/python3/dist-packages/bcc", "/usr/bin/python3", "/usr/lib/python3.11", "/usr/include",
    "/usr/lib/clang", "/usr/lib/llvm-14/lib/clang",
)  # fmt: skip
LIBRARIES: Final = ("libbpf.so.1", "libbcc.so.0", "libnss_files.so.2", "libgcc_s.so.1")
PYTHON_UNUSED: Final = (
    "site-packages/mypy", "site-packages/mypyc", "bin/ruff", "site-packages/pip", "site-packages/setuptools",
    "site-packages/matplotlib", "site-packages/fontTools", "site-packages/PIL", "site-packages/pillow.libs",
    "grpc_tools", "contourpy", "kiwisolver", "mpl_toolkits", "python3.11/test", "python3.11/idlelib",
    "python3.11/ensurepip",
)  # fmt: skip
"""Packages of the environment that no test in a guest imports."""
SOURCES: Final = ("mfsd", "tests", "bpf", "proto", "systemd", "bench", "scripts", "pyproject.toml")
LAYOUT: Final = "1"
"""Raise it with every change to how the root file system is packed."""
MODULES: Final = ("virtio_pci", "virtio_blk", "ext4", "9p", "9pnet_virtio", "virtio_rng")
"""Needed before there is a root to load modules from."""

_INIT: Final = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /root
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
for m in $(/bin/busybox cat /modules/order); do /bin/busybox insmod /modules/$m || echo "vm: $m not loaded"; done
i=0
while [ ! -b /dev/vda ] && [ $i -lt 200 ]; do /bin/busybox sleep 0.1; i=$((i+1)); done
/bin/busybox mount -t ext4 /dev/vda /root || { echo "vm: no root file system"; /bin/busybox poweroff -f; }
/bin/busybox mount -o move /dev /root/dev
/bin/busybox mount -o move /proc /root/proc
/bin/busybox mount -o move /sys /root/sys
/bin/busybox cp /mfsd-vm-init /root/mfsd-vm-init
exec /bin/busybox switch_root /root /mfsd-vm-init
"""


def base_disk(cache: Path) -> Path:
    """The guests' root file system without kernel and checkout, packed unless an image of the same things is there."""
    packages = sorted(f"{d.name} {d.version}" for d in metadata.distributions())
    bound = [LAYOUT, sys.prefix, sys.base_prefix, *packages, *TOOLS, *FILES, *LIBRARIES, *PYTHON_UNUSED]
    key = hashlib.sha256("\n".join(bound).encode()).hexdigest()[:16]
    image = cache / "images" / f"base-{key}.ext4"
    if image.exists():
        return image
    print("vm: packing the guests' root file system", flush=True)
    with _stage(image) as stage:
        _fill(stage)
    for old in image.parent.glob("base-*.ext4"):
        if old != image:
            old.unlink()
    return image


def kernel_disk(kernel: Kernel, cache: Path) -> Path:
    """The kernel's modules and headers: /lib/modules and /usr/src of the guest."""
    image = cache / "images" / f"kernel-{kernel.release}.ext4"
    if not image.exists():
        with _stage(image) as stage:
            modules = stage / "modules" / kernel.release
            source = kernel.root / "lib/modules" / kernel.release
            shutil.copytree(source, modules, symlinks=True, ignore=_hardware)
            (stage / "lib").mkdir()
            (stage / "lib/modules").symlink_to("../modules")
            _run(["depmod", "-b", str(stage), kernel.release])
            headers = kernel.root / "usr/src"
            (shutil.copytree(headers, stage / "src", symlinks=True) if headers.is_dir() else (stage / "src").mkdir())
    return image


def prepare(kernel: Kernel, cache: Path) -> None:
    """Make the images that are missing, so that guests can start side by side."""
    base_disk(cache)
    kernel_disk(kernel, cache)


def pack_checkout(to: Path, stage: Path) -> None:
    """Write the checkout, with what was built, as a tar that a guest unpacks at its root.

    ``stage`` is a folder for a copy with byte code, which takes a guest seconds to make, and every process anew.
    """
    for source in SOURCES:
        copy = stage / str(ROOT).lstrip("/") / source
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, copy, ignore=shutil.ignore_patterns(".mypy_cache", "__pycache__"))
        else:
            shutil.copy2(ROOT / source, copy)
    _run([sys.executable, "-m", "compileall", "-q", "-s", str(stage), "-p", "/", str(stage)], may_fail=True)
    with tarfile.open(to, "w") as tar:
        for part in sorted(stage.iterdir()):
            tar.add(part, part.name)
    shutil.rmtree(stage)


@contextlib.contextmanager
def _stage(image: Path) -> Iterator[Path]:
    """A folder whose contents become the image; a cut-short run leaves no image behind."""
    image.parent.mkdir(parents=True, exist_ok=True)
    stage, part = image.with_suffix(".stage"), image.with_suffix(".part")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        yield stage
        size = int(_run(["du", "-sm", str(stage)]).split()[0])
        part.unlink(missing_ok=True)
        # A third more than the files, for the blocks that they don't fill, and room for what a guest writes.
        features = ["-O", "^has_journal,^metadata_csum", "-N", "150000", "-m", "0"]
        _run(["mkfs.ext4", "-q", *features, "-d", str(stage), str(part), f"{size * 4 // 3 + 256}M"])
        part.rename(image)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _fill(stage: Path) -> None:
    for folder in ("proc", "sys", "dev", "run", "tmp", "results", "kernel", "var/lib", "var/tmp", "root", "etc"):
        (stage / folder).mkdir(parents=True)
    # Debian merged these into /usr, and paths of both kinds are in use.
    for name in ("bin", "sbin", "lib", "lib64"):
        (stage / "usr" / name).mkdir(parents=True)
        (stage / name).symlink_to(f"usr/{name}")
    (stage / "var/run").symlink_to("/run")
    for folder in ("lib/modules", "src"):
        (stage / "usr" / folder).mkdir()
    binaries = [found for found in map(_find, TOOLS) if found is not None]
    libraries = [found for found in (Path("/usr/lib/x86_64-linux-gnu") / name for name in LIBRARIES) if found.exists()]
    base, venv = Path(sys.base_prefix), Path(sys.prefix)
    _copy(stage, [*binaries, *libraries, *(p for p in map(Path, FILES) if p.exists())])
    _copy(stage, [base / "bin", base / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}"], PYTHON_UNUSED)
    _copy(stage, base.glob("lib/libpython*"))
    _copy(stage, [venv], PYTHON_UNUSED)
    extensions = [p for top in (base, venv) for p in (stage / str(top).lstrip("/")).rglob("*.so*")]
    _copy_libraries(stage, [*binaries, *libraries, *extensions])
    # Byte code is written at first import, which this machine may not have done; emulated, it takes minutes.
    folders = [str(stage / str(top).lstrip("/")) for top in (base, venv)]
    _run([sys.executable, "-m", "compileall", "-q", "-s", str(stage), "-p", "/", *folders], may_fail=True)


def build_initrd(kernel: Kernel, work: Path) -> Path:
    """Pack what finds and mounts the root; returns the archive (not compressed: reading it is quicker emulated)."""
    stage, archive = work / "initrd", work / "initrd.cpio"
    shutil.rmtree(stage, ignore_errors=True)
    (stage / "bin").mkdir(parents=True)
    (stage / "modules").mkdir()
    shutil.copy("/usr/bin/busybox" if Path("/usr/bin/busybox").exists() else "/bin/busybox", stage / "bin/busybox")
    order: list[str] = []
    for module in MODULES:
        shown = _run(["modprobe", "-d", str(kernel.root), "-S", kernel.release, "--show-depends", module])
        for line in shown.splitlines():
            words = line.split()
            if words[:1] != ["insmod"]:  # "builtin NAME"
                continue
            path = Path(words[1])
            name = path.name.removesuffix(".xz")
            if name not in order:
                data = path.read_bytes()
                (stage / "modules" / name).write_bytes(lzma.decompress(data) if path.suffix == ".xz" else data)
                order.append(name)
    (stage / "modules/order").write_text("\n".join(order) + "\n")
    (stage / "init").write_text(_INIT)
    shutil.copy(_INIT_FILE, stage / "mfsd-vm-init")
    for name in ("init", "mfsd-vm-init"):
        (stage / name).chmod(0o755)
    with archive.open("wb") as out:
        names = "\n".join(str(p.relative_to(stage)) for p in sorted(stage.rglob("*")))
        argv = ["busybox", "cpio", "-o", "-H", "newc"]
        subprocess.run(argv, cwd=stage, input=names.encode(), stdout=out, stderr=subprocess.DEVNULL, check=True)
    shutil.rmtree(stage)
    return archive


def _find(name: str) -> Path | None:
    found = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    return Path(found) if found else None


def _copy(stage: Path, paths: Iterable[Path], skip: Iterable[str] = ()) -> None:
    """Copy files, folders and links (with what they lead to) to the same place under the stage."""
    for path in paths:
        where = path.parent.resolve() / path.name  # /bin/ls is /usr/bin/ls
        to = stage / str(where).lstrip("/")
        if to.exists() or to.is_symlink():
            continue
        to.parent.mkdir(parents=True, exist_ok=True)
        if where.is_symlink():
            to.symlink_to(where.readlink())
            _copy(stage, [where.resolve()], skip)
        elif where.is_dir():
            shutil.copytree(where, to, symlinks=True, ignore=functools.partial(_skipped, tuple(skip)))
        else:
            shutil.copy2(where, to)


def _skipped(skip: tuple[str, ...], folder: str, names: list[str]) -> set[str]:
    return {n for n in names if any(f"{folder}/{n}".endswith(f"/{s}") for s in skip)}


def _copy_libraries(stage: Path, binaries: Iterable[Path]) -> None:
    """What the dynamic loader will ask for. Libraries beside a wheel's extension are in the tree already."""
    wanted: set[Path] = set()
    files = [str(p) for p in binaries]
    for start in range(0, len(files), 200):
        done = subprocess.run(
            ["/usr/bin/ldd", *files[start : start + 200]], check=False, capture_output=True, text=True
        )
        for line in done.stdout.splitlines():
            target = line.split("=>")[-1].split("(")[0].strip()
            if target.startswith("/") and not target.startswith(str(stage)) and not target.endswith(":"):
                wanted.add(Path(target))
    _copy(stage, wanted)


def _hardware(folder: str, names: list[str]) -> set[str]:
    """Modules of hardware that no guest has; they are nine tenths of all."""
    top = ("sound", "gpu", "media", "wireless", "staging", "infiniband", "iio", "usb", "scsi", "hwmon", "bluetooth")
    ether = {n for n in names if folder.endswith("/net/ethernet")}
    return {n for n in names if n in top or n == "vmlinuz"} | ether


def _run(argv: list[str], *, may_fail: bool = False) -> str:
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if done.returncode and not may_fail:
        raise SystemExit(f"vm: {' '.join(argv)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout
