# SPDX-License-Identifier: Apache-2.0
"""conf.d: what several files say together, and which of them is named when something is wrong."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import pytest
from support.rig import as_user

from mfsd.daemon import config_files
from mfsd.daemon.config import ConfigError, load

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def main(tmp_path: Path) -> Path:
    path = tmp_path / "mfsd.toml"
    path.write_text('[daemon]\ntick_ms = 5\n[[device]]\nname = "eth0"\nrate = "10gbit"\n[bands.dscp]\ncontrol = 8\n')
    (tmp_path / "conf.d").mkdir()
    return path


def drop_in(main: Path, name: str, text: str) -> Path:
    path = main.parent / "conf.d" / name
    path.write_text(text)
    return path


def test_tables_are_merged_key_by_key_and_the_later_file_wins(main: Path) -> None:
    drop_in(main, "20-b.toml", "[daemon]\ntick_ms = 7\n[bands.dscp]\ndefault = 1\n")
    drop_in(main, "10-a.toml", '[daemon]\ntick_ms = 6\nmode = "enforce"\n')
    drop_in(main, "30-c.toml.bak", "[daemon]\ntick_ms = 8\n")
    config = load(main)
    assert (config.daemon.tick_ms, config.daemon.mode.value) == (7, "enforce")
    assert config.bands.dscp == {"control": 8, "default": 1}


def test_devices_are_added_and_a_known_one_is_changed(main: Path) -> None:
    drop_in(main, "a.toml", '[[device]]\nname = "eth1"\n[[device]]\nname = "eth0"\nrate = "5gbit"\ntiny_len = 0\n')
    drop_in(main, "b.toml", '[[peer]]\nnetwork = "10.0.0.0/8"\nrate = "1gbit"\n')
    drop_in(main, "c.toml", '[[peer]]\nnetwork = "10.0.0.0/8"\nrate = "2gbit"\n')
    config = load(main)
    assert [(d.name, str(d.rate), d.tiny_len) for d in config.device] == [("eth0", "5gbit", 0), ("eth1", "None", 128)]
    assert [str(p.rate) for p in config.peer] == ["2gbit"]


def test_two_entries_for_a_device_in_one_file_are_still_a_mistake(main: Path) -> None:
    path = drop_in(main, "a.toml", '[[device]]\nname = "eth1"\n[[device]]\nname = "eth1"\n')
    with pytest.raises(ConfigError, match="each device once") as e:
        load(main)
    assert str(e.value).startswith(f"{path}: device[1].name")


def test_without_mfsd_toml_the_drop_ins_do(main: Path) -> None:
    main.unlink()
    with pytest.raises(ConfigError, match=r"mfsd\.toml: can't be read"):
        load(main)
    drop_in(main, "a.toml", "[daemon]\ntick_ms = 9\n")
    assert load(main).daemon.tick_ms == 9


def test_what_editors_leave_is_none(main: Path) -> None:
    drop_in(main, "a.toml", "[daemon]\ntick_ms = 9\n")
    (main.parent / "conf.d" / ".#a.toml").symlink_to("somebody@host.123:456")
    drop_in(main, ".b.toml", "[daemon]\ntick_ms = ")
    assert load(main).daemon.tick_ms == 9


@pytest.mark.parametrize("what", ["a file", "a link to itself"])
def test_what_is_no_folder_is_named(main: Path, what: str) -> None:
    folder = main.parent / "conf.d"
    folder.rmdir()
    if what == "a file":
        folder.touch()
    else:
        folder.symlink_to(folder)
    with pytest.raises(ConfigError, match=r"conf\.d: can't be read"):
        load(main)


@pytest.mark.parametrize("mode", [0o000, 0o644, 0o311], ids=oct)
def test_drop_ins_that_can_not_be_read_are_not_taken_for_none(main: Path, mode: int) -> None:
    """Those of a folder that only root may read any more: without them the daemon would observe."""
    drop_in(main, "a.toml", "[daemon]\ntick_ms = 9\n")
    folder, root = main.parent / "conf.d", os.geteuid() == 0
    for above in [main.parent, *main.parent.parents][:-2] if root else []:
        above.chmod(0o755)
    assert load(main).daemon.tick_ms == 9
    folder.chmod(mode)
    with (
        as_user(65534) if root else contextlib.nullcontext(),
        pytest.raises(ConfigError, match=r"conf\.d(/a\.toml)?: can't be read: Permission denied"),
    ):
        load(main)
    folder.chmod(0o755)
    assert load(main).daemon.tick_ms == 9


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[daemon]\ntick_ms = 0\n", "daemon.tick_ms = 0: must be"),
        ("[daemon]\nzoo = 0\n", "daemon.zoo = 0: unknown key"),
        ("[zoo]\n", "zoo = {}: unknown key"),
        ("daemon = 3\n", "daemon = 3: must be a section"),
        ("device = 3\n", "device = 3: must be"),
        ('[[device]]\nname = "eth1"\nrate = "fast"\n', 'device[0].rate = "fast": must be'),
        ("[[device]]\ntiny_len = 1\n", "device[0].name = (unset): required"),
        ("[bands]\nfloors = [0.1, 2.0]\n", "bands.floors[1] = 2.0: must be"),
        ("[bands.dscp]\n'level 7' = 3\n", 'bands.dscp."level 7" = 3: no such class or band'),
        ("[policy]\nmargins = 9\n", "policy.margins"),
        ("[daemon\n", "is not TOML"),
        ("#" * (config_files.MAX_BYTES + 1), "is not TOML: more than"),
        ("a = " + "[" * 5000 + "]" * 5000, "is not TOML: nested too deeply"),
        (f"{'.'.join('a' * 900)} = 1", "a = { a = { a = { a = ... } } }: unknown key"),
        (f"[daemon]\n{'x' * 300}.y = 1", f"daemon.{'x' * 200}... (300 characters) = "),
        (f"[daemon]\n'{'.' * 300}' = 1", 'daemon."' + "." * 199 + "... (302 characters) = "),
    ],
)
def test_a_problem_names_its_file_and_the_place_in_it(main: Path, text: str, problem: str) -> None:
    drop_in(main, "a.toml", '[[device]]\nname = "eth2"\n')
    path = drop_in(main, "b.toml", text)
    with pytest.raises(ConfigError) as e:
        load(main)
    (line,) = str(e.value).splitlines()
    assert line.startswith(f"{path}: {problem}")


def test_a_pipe_among_them_is_not_waited_for(main: Path) -> None:
    path = drop_in(main, "a.toml", "")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConfigError) as e:
        load(main)
    assert str(e.value) == f"{path}: can't be read: it is no regular file"


@pytest.mark.root
def test_a_file_of_the_kernel_s_without_end_is_not_waited_for(main: Path) -> None:
    path = drop_in(main, "a.toml", "")
    path.unlink()
    path.symlink_to("/proc/kmsg")
    with pytest.raises(ConfigError) as e:
        load(main)
    assert str(e.value).startswith(f"{path}: ")


def test_every_file_s_problems_at_once(main: Path) -> None:
    a = drop_in(main, "a.toml", "[daemon]\nslots = 1\n")
    b = drop_in(main, "b.toml", "[rescue]\nstall_ms = -1\n")
    with pytest.raises(ConfigError) as e:
        load(main)
    assert [line.partition(": ")[0] for line in str(e.value).splitlines()] == [str(a), str(b)]


def test_a_problem_of_two_files_together_is_the_later_one_s(main: Path) -> None:
    # Each is right by itself; the floor that is named came with the second.
    drop_in(main, "a.toml", "[bands]\ndefault_floor = 0.6\n")
    path = drop_in(main, "b.toml", "[bands]\nfloors = [0.5]\n")
    with pytest.raises(ConfigError, match="all floors together") as e:
        load(main)
    assert str(e.value).startswith(f"{path}: bands.floors")


def test_the_order_of_files(main: Path) -> None:
    names = ["z.toml", "10.toml", "2.toml"]
    for name in names:
        drop_in(main, name, "")
    assert [p.name for p in config_files.files(main)] == ["mfsd.toml", "10.toml", "2.toml", "z.toml"]


def test_very_many_files_are_read_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each looked through the entries of all before it."""
    looked, identity, count = [0], config_files._identity, 50

    def counted(name: str, entry: object) -> str | None:
        looked[0] += 1
        return identity(name, entry)

    monkeypatch.setattr(config_files, "_identity", counted)
    main, folder = tmp_path / "mfsd.toml", tmp_path / "conf.d"
    main.write_text("peer = 1\n")
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:03}.toml").write_text(f'[[peer]]\nnetwork = "10.0.{i}.0/24"\nrate = "{i + 1}gbit"\n')
    (folder / "last.toml").write_text('[[peer]]\nnetwork = "10.0.7.0/24"\nrate = "100gbit"\n')
    peers = config_files.read(main).data["peer"]
    assert [p["rate"] for p in peers] == [f"{100 if i == 7 else i + 1}gbit" for i in range(count)]  # the others' places
    assert looked[0] <= 2 * count
