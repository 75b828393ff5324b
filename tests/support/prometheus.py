# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus: Debian's, unpacked beside the tests, not installed, so that no service starts anywhere."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import subprocess
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from support.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.namespaces import NetnsPair

CACHE: Final = Path(os.environ.get("MFSD_VM_CACHE") or "/var/lib/mfsd-vm") / "prometheus"
FOLDER: Final = Path(__file__).resolve().parents[2] / "packaging" / "monitoring"
DASHBOARD: Final[dict[str, Any]] = json.loads((FOLDER / "dashboard.json").read_text())
PORT: Final = 9090
INTERVAL: Final = "250ms"


def programs() -> tuple[str, str]:
    """Paths of prometheus and promtool."""
    found = shutil.which("prometheus"), shutil.which("promtool")
    if found[0] and found[1]:
        return found[0], found[1]
    unpacked = CACHE / "usr" / "bin"
    if not (unpacked / "promtool").exists():
        part = CACHE.with_name("prometheus.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        subprocess.run(["apt-get", "update", "-qq"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["apt-get", "download", "-qq", "prometheus"], check=True, cwd=part, stdout=subprocess.DEVNULL)
        (package,) = part.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), str(part)], check=True)
        part.rename(CACHE)
    return str(unpacked / "prometheus"), str(unpacked / "promtool")


@dataclass
class Prometheus:
    """One that runs in namespace ``a`` of a pair."""

    pair: NetnsPair

    def get(self, path: str, **parameters: str) -> Any:
        """Its answer to a question of the HTTP API."""

        def ask() -> Any:
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", PORT, timeout=20)) as connection:
                connection.request("GET", f"/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
                answer = json.load(connection.getresponse())
            assert answer["status"] == "success", answer
            return answer["data"]

        return self.pair.call(self.pair.a, ask)

    def query(self, expression: str) -> list[float]:
        """Values of an expression now."""
        found = self.get("query", query=expression)["result"]
        return [float(one["value"][1]) for one in found]


@contextlib.contextmanager
def watching(pair: NetnsPair, folder: Path, target: str, rules: Path) -> Iterator[Prometheus]:
    """Prometheus, which scrapes ``target`` ("host:port") in namespace ``a`` and evaluates rules."""
    config = folder / "prometheus.yml"
    config.write_text(
        f"""
global: {{scrape_interval: {INTERVAL}, scrape_timeout: {INTERVAL}, evaluation_interval: {INTERVAL}}}
rule_files: ["{rules}"]
scrape_configs: [{{job_name: mfsd, static_configs: [{{targets: ["{target}"]}}]}}]
"""
    )
    argv = [
        programs()[0], f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{PORT}", "--enable-feature=exemplar-storage", "--log.level=warn",
    ]  # fmt: skip
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(["ip", "netns", "exec", pair.a, *argv], stdout=log, stderr=log)
        try:
            prometheus = Prometheus(pair)

            def up() -> bool:
                assert process.poll() is None, (folder / "prometheus.log").read_text()
                with contextlib.suppress(OSError, ValueError):  # not ready: no JSON
                    return prometheus.query('up{job="mfsd"}') == [1.0]
                return False

            wait_for(up, "Prometheus to scrape mfsd")
            yield prometheus
        finally:
            process.terminate()
            process.wait()
