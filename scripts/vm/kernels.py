# SPDX-License-Identifier: Apache-2.0
"""Stock Debian kernels for the guests: which there are, how they are fetched, what each was built with.

Nothing is installed and the machine's own package sources stay as they are: apt gets a sources list, lists and caches
of its own, packages are downloaded and unpacked under the cache folder.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"
DEFAULT_CACHE: Final = Path("/var/lib/mfsd-vm")


@dataclass(frozen=True, slots=True)
class Stock:
    """A distribution's kernel. ``image``: beginning of the package that holds vmlinuz."""

    name: str
    suite: str
    release: str
    """Pattern of its release, as ``uname -r`` prints it."""
    packages: tuple[str, ...]
    """Package names; RELEASE is the release, COMMON the release of the architecture-independent headers."""


_ONE = ("linux-image-RELEASE", "linux-headers-RELEASE", "linux-headers-COMMON")
_SPLIT = ("linux-binary-RELEASE", "linux-modules-RELEASE", "linux-base-RELEASE", *_ONE[1:])
KERNELS: Final = {
    k.name: k
    for k in (
        Stock("6.1", "bookworm", r"6\.1\.0-\d+-amd64", _ONE),
        Stock("6.12", "trixie", r"6\.12\.\d+\+deb13-amd64", _ONE),
        # From 7.1 on Debian splits the image.
        Stock("7.3", "trixie-backports", r"7\.3\.\d+\+deb13-amd64", _SPLIT),
    )
}

QDISCS: Final = {
    "prio": "PRIO", "htb": "HTB", "tbf": "TBF", "drr": "DRR", "ets": "ETS", "fq": "FQ", "fq_codel": "FQ_CODEL",
    "mqprio": "MQPRIO", "netem": "NETEM", "multiq": "MULTIQ", "sfq": "SFQ", "codel": "CODEL", "red": "RED",
    "cake": "CAKE", "ingress": "INGRESS", "clsact": "INGRESS",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel."""

    name: str
    release: str
    root: Path
    """Holds lib/modules/RELEASE and usr/src."""
    vmlinuz: Path
    config: dict[str, str]

    def features(self) -> set[str]:
        """What tests may not say this kernel lacks: qdiscs by name, "tcx", "bpf_qdisc", "yield", "headers"."""
        out = {name for name, option in QDISCS.items() if self.config.get(f"CONFIG_NET_SCH_{option}", "n") != "n"}
        out |= {"tcx"} if self.config.get("CONFIG_NET_XGRESS") == "y" else set()
        out |= {"bpf_qdisc"} if self.config.get("CONFIG_NET_SCH_BPF") == "y" else set()
        out |= {"vlan"} if self.config.get("CONFIG_VLAN_8021Q", "n") != "n" else set()
        version = tuple(int(number) for number in self.release.split(".")[:2])
        out |= {"yield"} if version >= (6, 4) else set()  # links for congestion controls
        out |= {"headers"} if (self.root / "usr/src").is_dir() else set()
        return out | {"pfifo_fast", "mq", "noqueue", "bfifo", "pfifo"}


def cache_dir() -> Path:
    """Folder for downloads, images and results: MFSD_VM_CACHE, or /var/lib/mfsd-vm."""
    return Path(os.environ.get("MFSD_VM_CACHE") or DEFAULT_CACHE).resolve()


def fetch(name: str, cache: Path) -> Kernel:
    """Download and unpack a kernel, unless it is there. Raises SystemExit with what went wrong."""
    stock = KERNELS[name]
    root = cache / "kernels" / name
    found = _unpacked(stock, root)
    if found is not None:
        return found
    apt = _apt(cache)
    release = _newest(apt, stock)
    common = release.removesuffix("-amd64") + "-common"
    wanted = [p.replace("RELEASE", release).replace("COMMON", common) for p in stock.packages]
    debs = cache / "debs" / name
    shutil.rmtree(debs, ignore_errors=True)
    debs.mkdir(parents=True)
    print(f"vm: downloading {', '.join(wanted)}", flush=True)
    _run(["apt-get", *apt, "download", *wanted], cwd=debs)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for deb in debs.glob("*.deb"):
        _run(["dpkg", "-x", str(deb), str(root)])
    shutil.rmtree(debs)
    if not (root / "lib").exists():  # packages since trixie: /usr/lib/modules
        (root / "lib").symlink_to("usr/lib")
    _run(["depmod", "-b", str(root), release])
    found = _unpacked(stock, root)
    if found is None:
        raise SystemExit(f"vm: no kernel {stock.release} in what was unpacked to {root}")
    return found


def _unpacked(stock: Stock, root: Path) -> Kernel | None:
    modules = root / "lib" / "modules"
    if not modules.is_dir():
        return None
    for folder in modules.iterdir():
        if not re.fullmatch(stock.release, folder.name) or not (folder / "modules.dep").exists():
            continue
        images = (root / "boot" / f"vmlinuz-{folder.name}", folder / "vmlinuz")
        configs = (root / "boot" / f"config-{folder.name}", folder / "config")
        image, config = (next((p for p in paths if p.exists()), None) for paths in (images, configs))
        if image is not None and config is not None:
            text = config.read_text()
            options = dict(line.split("=", 1) for line in text.splitlines() if line.startswith("CONFIG_"))
            return Kernel(stock.name, folder.name, root, image, options)
    return None


def _apt(cache: Path) -> list[str]:
    """Options that give apt a world of its own, with the mirror of the machine's."""
    home = cache / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    mirror = _mirror()
    suites = sorted({k.suite for k in KERNELS.values()})
    lines = [f"deb [signed-by={KEYRING}] {mirror} {suite} main" for suite in suites]
    (home / "sources.list").write_text("\n".join(lines) + "\n")
    options = [
        f"Dir::Etc::SourceList={home}/sources.list",
        "Dir::Etc::SourceParts=/dev/null",
        f"Dir::State::Lists={home}/lists",
        f"Dir::Cache={home}/cache",
        "APT::Architecture=amd64",
        "APT::Update::Error-Mode=any",  # else an unreachable mirror is a warning
        "Acquire::Retries=2",
        "Acquire::http::Timeout=30",
        "APT::Sandbox::User=root",  # the cache may be a folder that the user _apt can't enter
    ]
    apt = [word for option in options for word in ("-o", option)]
    _run(["apt-get", *apt, "-qq", "update"])
    return apt


def _mirror() -> str:
    """Where the machine gets Debian's packages from."""
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for file in files:
        if not file.is_file():
            continue
        for line in file.read_text().splitlines():
            found = re.match(r"(?:URIs:|deb(?:\s+\[[^]]*\])?)\s+(\S+/debian)/?(?:\s|$)", line)
            if found:
                return found[1]
    return "http://deb.debian.org/debian"


def _newest(apt: list[str], stock: Stock) -> str:
    """Newest release of a kernel that all its packages exist for."""
    first = stock.packages[0].replace("RELEASE", "")
    out = _run(["apt-cache", *apt, "pkgnames", first])
    found = [n.removeprefix(first) for n in out.split() if re.fullmatch(stock.release, n.removeprefix(first))]
    if not found:
        raise SystemExit(f"vm: the mirror has no package {first}{stock.release}")
    return max(found, key=lambda r: [int(n) for n in re.findall(r"\d+", r)])


def _run(argv: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(argv, cwd=cwd, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"vm: {' '.join(argv)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout
