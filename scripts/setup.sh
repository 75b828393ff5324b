#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Install what building, testing and the demo need: Debian packages and a virtual environment. Idempotent.
# Usage: scripts/setup.sh VENV   (environment: PYTHON, the interpreter to build it from)
set -eu

venv=$1
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."

say() { echo "setup: $*"; }

# clang, llvm: compile and strip the BPF object; bpftool: read its BTF; libbpf1: load it at run time;
# libbpf-dev, linux-libc-dev: headers; iproute2: namespaces of the tests and the demo; ethtool: offloads in the lab.
packages="clang llvm bpftool libbpf1 libbpf-dev linux-libc-dev iproute2 ethtool procps python3 python3-venv"
missing=""
for p in $packages; do
    status=$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null || true)
    [ "$status" = installed ] || missing="$missing $p"
done
if [ -n "$missing" ]; then
    say "installing Debian packages:$missing"
    if [ "$(id -u)" -ne 0 ]; then
        say "not root; run: apt-get install$missing" >&2
        exit 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # shellcheck disable=SC2086 # a list of words
    apt-get install -y -qq --no-install-recommends $missing >/dev/null
else
    say "Debian packages are there"
fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    say "$python is older than 3.11; set PYTHON" >&2
    exit 1
}
if [ ! -x "$venv/bin/python" ]; then
    say "making the virtual environment $venv"
    "$python" -m venv "$venv"
fi
say "installing Python packages (scripts/constraints.txt says which versions)"
"$venv/bin/python" -m pip install -q --disable-pip-version-check -c scripts/constraints.txt -e '.[dev,lab]'
say "done"
