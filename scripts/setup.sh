#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Install what building, testing and the demo need. Idempotent, and quick where all of it is there.
#   scripts/setup.sh system        Debian packages, which takes root
#   scripts/setup.sh python VENV   a virtual environment (environment: PYTHON, the interpreter to build it from)
set -eu
cd "$(dirname "$0")/.."

say() { echo "setup: $*"; }

system() {
    # clang, llvm: compile and strip the BPF object; bpftool: read its BTF; libbpf1: load it at run time;
    # libbpf-dev, linux-libc-dev: headers; iproute2: namespaces of the tests and the demo; ethtool: offloads in the lab;
    # systemd: its systemd-analyze checks the unit; tmux: the terminal of mfsctl top.
    packages="clang llvm bpftool libbpf1 libbpf-dev linux-libc-dev iproute2 ethtool procps python3 python3-venv systemd tmux"
    missing=""
    for p in $packages; do
        status=$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null || true)
        [ "$status" = installed ] || missing="$missing $p"
    done
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" -ne 0 ]; then
        say "missing Debian packages, and you are not root; let root run: apt-get install$missing" >&2
        exit 1
    fi
    say "installing Debian packages:$missing"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # shellcheck disable=SC2086 # a list of words
    apt-get install -y -qq --no-install-recommends $missing >/dev/null
}

python() {
    venv=$1
    interpreter=${PYTHON:-python3}
    "$interpreter" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        say "$interpreter is missing or older than 3.11; let root run make setup, or set PYTHON" >&2
        exit 1
    }
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        say "making the virtual environment $venv"
        "$interpreter" -m venv --clear "$venv" || {
            say "is the Debian package python3-venv missing? Let root run make setup" >&2
            exit 1
        }
    fi
    say "installing Python packages (scripts/constraints.txt says which versions)"
    "$venv/bin/python" -m pip install -q --disable-pip-version-check --use-pep517 -c scripts/constraints.txt -e '.[dev,lab]'
}

case ${1-} in
system) system ;;
python) python "${2:?which folder?}" ;;
*)
    echo "usage: $0 system | python VENV" >&2
    exit 2
    ;;
esac
