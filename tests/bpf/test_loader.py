# SPDX-License-Identifier: Apache-2.0
"""Loading, sharing and closing; the object's types against mfsd/datapath/_abi.py; errors that say what to do."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.frames import frame4, key4, key6

from bench.parts.testrun import run_packet
from mfsd.datapath import _abi
from mfsd.datapath.bpf import libbpf
from mfsd.datapath.bpf.keys import MapFullError, cookie_key, tuple_key
from mfsd.datapath.bpf.libbpf import BpfObject, LibbpfLoader, check_kernel, object_path, verdict
from mfsd.datapath.bpf.loader import DEVICE_MAPS, MAP_SIZES, SHARED_MAPS
from mfsd.datapath.errors import LoaderError
from mfsd.ground.bands import PRIO_BANDS
from mfsd.ground.model import Endpoints

if TYPE_CHECKING:
    from support.bpf_rig import Rig

pytestmark = pytest.mark.bpf


def open_fds() -> set[str]:
    """What this process has open of BPF."""
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        try:
            target = str(fd.readlink())
        except FileNotFoundError:  # the listing's own
            continue
        if "bpf" in target:
            found.add(f"{fd.name} {target}")
    return found


# --- the ABI ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def btf() -> dict[int, dict[str, Any]]:
    """Types of the loaded object (not of abi.o, from which _abi.py was made), by id."""
    tool = shutil.which("bpftool", path=os.environ["PATH"] + ":/usr/sbin")
    assert tool, "install the Debian package bpftool"
    argv = [tool, "-j", "btf", "dump", "file", str(object_path("classifier"))]
    out = subprocess.run(argv, check=True, capture_output=True)
    return {t["id"]: t for t in json.loads(out.stdout)["types"]}


@pytest.mark.parametrize(
    ("struct", "dtype"),
    [
        ("mfsd_slot", _abi.SLOT_DTYPE),
        ("mfsd_tuple", _abi.TUPLE_DTYPE),
        ("mfsd_host", _abi.HOST_DTYPE),
        ("mfsd_dev", _abi.DEV_DTYPE),
        ("mfsd_band_map", _abi.BAND_MAP_DTYPE),
        ("mfsd_counter", _abi.COUNTER_DTYPE),
    ],
)
def test_layouts_are_those_of_abi(btf: dict[int, dict[str, Any]], struct: str, dtype: np.dtype[Any]) -> None:
    (t,) = (t for t in btf.values() if (t["kind"], t["name"]) == ("STRUCT", struct))
    assert dtype.fields is not None
    assert t["size"] == dtype.itemsize
    assert {m["name"]: m["bits_offset"] // 8 for m in t["members"]} == {n: f[1] for n, f in dtype.fields.items()}
    for m in t["members"]:
        assert size_of(btf, m["type_id"]) == dtype.fields[m["name"]][0].itemsize, m["name"]


def size_of(types: dict[int, dict[str, Any]], type_id: int) -> int:
    t = types[type_id]
    if t["kind"] in ("TYPEDEF", "CONST", "VOLATILE"):
        return size_of(types, t["type_id"])
    if t["kind"] == "ARRAY":
        return int(t["nr_elems"]) * size_of(types, t["type_id"])
    return int(t["size"])


def test_the_open_options_are_those_of_libbpf(tmp_path: Path) -> None:
    lines = ["#include <bpf/libbpf.h>", "#include <stddef.h>"]
    for name, *_ in libbpf._OpenOpts._fields_:
        if name != "was_attach_prog_fd":  # has no name any more
            at = getattr(libbpf._OpenOpts, name).offset
            lines.append(f'_Static_assert(offsetof(struct bpf_object_open_opts, {name}) == {at}, "{name}");')
    source = tmp_path / "layout.c"
    source.write_text("\n".join(lines))
    done = subprocess.run(["clang", "-fsyntax-only", str(source)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_there_is_room_for_all_bands_of_a_device() -> None:
    assert _abi.MAX_BANDS == PRIO_BANDS


def test_rows_of_the_slot_table_do_not_straddle_cache_lines() -> None:
    assert 64 % _abi.SLOT_DTYPE.itemsize == 0


# --- loading and sharing ----------------------------------------------------------------------------------------------


def test_two_devices_share_the_host_but_not_the_device(rig: Rig) -> None:
    one = rig.classifier
    with LibbpfLoader().open_classifier(one.rows, one) as two:
        assert two.slots.shape == one.slots.shape
        rig.add_tuple(key4(), band=2)
        assert two.tuples.get(key4()) == 7
        assert run_packet(two.prog_fd, frame4()).priority == 0, "its device isn't described yet"
        two.dev[:] = one.dev
        two.dev["bands"]["classid"][0, 2] = 0x20001
        two.dev["major"] = 0x20000
        assert run_packet(two.prog_fd, frame4()).priority == 0x20001
        assert rig.run(frame4()).priority == 0x10030
        assert two.slots["packets"][7] == one.slots["packets"][7] == 3
        assert two.stats()[_abi.STAT_TUPLE] == two.bands()["packets"][2] == 1, "counters are per device"
        one.host["flags"] = 0
        assert two.host["flags"][0] == 0


def test_shared_tables_outlive_the_classifier_that_made_them() -> None:
    one = LibbpfLoader().open_classifier(64)
    two = LibbpfLoader().open_classifier(64, one)
    one.slots["lane"][63] = 5
    one.close()
    assert two.slots["lane"][63] == 5
    two.close()


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 16384])
def test_every_row_of_the_table_is_mapped(rows: int) -> None:
    with LibbpfLoader().open_classifier(rows) as c:
        c.slots["generation"] = np.arange(rows)
        assert c.slots.shape == (rows,)
        assert c.slots["generation"][-1] == rows - 1


def test_program_sees_rows_written_through_the_mapping_and_back(rig: Rig) -> None:
    rig.add_tuple(key4(), row=511)
    assert rig.run(frame4(), row=511).slot["packets"] == 1


def test_closing_gives_everything_back_and_twice_is_fine() -> None:
    gc.collect()
    before = open_fds()
    c = LibbpfLoader().open_classifier(16)
    view = c.slots
    assert len(open_fds() - before) >= 1 + len(SHARED_MAPS) + len(DEVICE_MAPS)
    c.close()
    c.close()
    view["lane"] = 1  # still memory, not a fault
    del view, c
    gc.collect()
    assert open_fds() == before


def test_descriptors_are_closed_on_exec() -> None:
    with LibbpfLoader().open_classifier(16) as c:
        assert not any(os.get_inheritable(fd) for fd in (c.prog_fd, *c.map_fds.values()))


# --- keys -------------------------------------------------------------------------------------------------------------


def test_keys_come_and_go() -> None:
    with LibbpfLoader().open_classifier(8) as c:
        assert c.cookies.get(cookie_key(2**64 - 1)) is None
        c.cookies.add(cookie_key(2**64 - 1), 3)
        c.cookies.add(cookie_key(2**64 - 1), 4)
        c.tuples.add(key6(), 5)
        assert (c.cookies.get(cookie_key(2**64 - 1)), c.tuples.get(key6()), c.tuples.get(key4())) == (4, 5, None)
        assert list(c.tuples) == [key6()]
        assert c.cookies.delete(cookie_key(2**64 - 1))
        assert not c.cookies.delete(cookie_key(2**64 - 1))
        assert list(c.cookies) == []


def test_full_map_says_so() -> None:
    with LibbpfLoader().open_classifier(4) as c:
        for i in range(4):
            c.cookies.add(cookie_key(i), i)
        with pytest.raises(MapFullError, match="slots"):
            c.cookies.add(cookie_key(99), 0)


def test_tuple_key_is_the_struct(rig: Rig) -> None:
    """Bytes of the key against the generated dtype, field by field."""
    row = np.frombuffer(key4(), dtype=_abi.TUPLE_DTYPE)[0]
    assert bytes(row["saddr"]) == bytes(10) + b"\xff\xff" + bytes([10, 0, 0, 1])
    assert (row["sport"].tobytes(), row["dport"].tobytes()) == ((40001).to_bytes(2, "big"), (5001).to_bytes(2, "big"))
    assert (int(row["proto"]), bytes(row["pad"])) == (6, bytes(3))
    assert rig.classifier.tuples.key_size == len(key6())


def test_port_out_of_range_is_refused() -> None:
    e = Endpoints(ip_address("::1"), 65536, ip_address("::1"), 1)
    with pytest.raises(OverflowError):
        tuple_key(e)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_old_kernels_are_refused() -> None:
    for release in ("5.10.0-28-amd64", "4.19.0", "3.2"):
        with pytest.raises(LoaderError, match=r"5\.11"):
            check_kernel(release)
    for release in ("5.11.0", "6.1.0-13-amd64", "7.3.1+deb13", "unknown"):
        check_kernel(release)


def test_missing_object_names_the_build() -> None:
    with pytest.raises(LoaderError, match="scripts/build"):
        LibbpfLoader(Path("/nonexistent/classifier.bpf.o")).open_classifier(16)


def test_object_without_our_maps() -> None:
    with pytest.raises(LoaderError, match="no map mfsd_host"):
        LibbpfLoader(object_path("empty")).open_classifier(16)


@pytest.mark.parametrize("rows", [0, -1, 1 << 21])
def test_absurd_tables_are_refused(rows: int) -> None:
    with pytest.raises(LoaderError, match="choose 1 to"):
        LibbpfLoader().open_classifier(rows)


def test_shared_table_of_another_size_is_refused(rig: Rig) -> None:
    with pytest.raises(LoaderError, match="512"):
        LibbpfLoader().open_classifier(16, rig.classifier)


def test_missing_library_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libbpf, "LIBRARY", "libbpf-that-is-not-there.so.1")
    libbpf.library.cache_clear()
    try:
        with pytest.raises(LoaderError, match="libbpf1"):
            LibbpfLoader()
    finally:
        libbpf.library.cache_clear()


def test_object_of_another_build_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MAP_SIZES, "mfsd_slots", (4, 56))
    with pytest.raises(LoaderError, match="different builds"):
        LibbpfLoader().open_classifier(16)


OLD_LOG = """0: R1=ctx() R10=fp0
; { return *(volatile int *)(long)skb->mark; } @ bad.bpf.c:3
1: (61) r0 = *(u32 *)(r1 +0)
R1 invalid mem access 'scalar'
processed 2 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0
"""
NEW_LOG = """1: (61) r0 = *(u32 *)(r1 +0)
Verification failed: Register Type Safety: Invalid dereference

Causal path:
  bad @ bad.bpf.c:3:38
  >>> 3 | { return *(volatile int *)(long)skb->mark; }

Suggestion:
  Preserve a pointer-valued register where needed, or reload and revalidate the pointer after scalar
  arithmetic, helper calls, or other operations that can invalidate it.

processed 2 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0
"""


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (OLD_LOG, "R1 invalid mem access 'scalar'"),
        (NEW_LOG, "Verification failed: Register Type Safety: Invalid dereference"),
        ("processed 2 insns\n\n", "the verifier left no log"),
        ("", "the verifier left no log"),
    ],
    ids=["until 7.2", "since 7.3", "statistics only", "none"],
)
def test_the_verdict_is_found_in_the_log(log: str, said: str) -> None:
    assert verdict(log) == said


def test_verifier_log_is_kept(tmp_path: Path) -> None:
    """A program that reads where nothing is: the verifier refuses it, and the error shows its last words."""
    source = tmp_path / "bad.bpf.c"
    source.write_text(
        '#include "compat.h"\nMFSD_PROGRAM int bad(struct __sk_buff *skb)\n'
        '{ return *(volatile int *)(long)skb->mark; }\nMFSD_LICENSE("GPL");\n'
    )
    bpf = Path(__file__).resolve().parents[2] / "bpf"
    include = [f"-I{bpf}", f"-I/usr/include/{os.uname().machine}-linux-gnu"]
    obj = tmp_path / "bad.bpf.o"
    argv = ["clang", "-O2", "-g", "-target", "bpf", "-mcpu=v3", *include, "-c", str(source), "-o", str(obj)]
    subprocess.run(argv, check=True, capture_output=True)
    with BpfObject(obj) as o, pytest.raises(LoaderError, match=r"invalid mem access|Invalid dereference") as caught:
        o.load()
    assert "R1" in caught.value.log_tail
