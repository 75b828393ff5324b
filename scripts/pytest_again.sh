#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# pytest_again.sh AGAIN PYTHON ARGS...: pytest; if AGAIN is not empty, tests that failed run once more, by themselves.
#
# Thousands of tests, many of which measure real TCP, meet somebody else's load now and then. Who passes alone was disturbed,
# and stays named in the first run's summary; who fails twice fails. Anything but failed tests is no reason to go on.
again=$1 python=$2
shift 2
"$python" -m pytest "$@"
status=$?
[ $status = 1 ] && [ -n "$again" ] || exit $status
for arg; do # the reports are those of the first run, and one process disturbs nobody
    shift
    case $arg in --junitxml=*) ;; *) set -- "$@" "$arg" ;; esac
done
echo "once more, what failed:"
exec "$python" -m pytest "$@" -n 0 --last-failed --last-failed-no-failures none
