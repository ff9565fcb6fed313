#!/usr/bin/env bash
# `make test-pythons`: sets mmref up and runs the tests that start no Ray on each of some Pythons, then says how each did.
# $PYTHONS are their versions, as "3.12 3.13"; $TESTS files or folders of tests, by default all.
# Each has an environment of its own, .venv-VERSION, which stays for the next time; `make clean` removes it.
set -u
cd "$(dirname "$0")/.."
tried=0 failed=0 table=""

one() {  # VERSION: sets $said; 0 where all went well
    local python=python$1 venv=.venv-$1 log status
    log=$venv/tests.log
    make --no-print-directory setup PYTHON="$python" VENV="$venv" || { said="set-up failed"; return 1; }
    # shellcheck disable=SC2086 # several files
    "$venv/bin/python" -m pytest -m "not slow and not ray" -n auto --dist loadscope ${TESTS:-} 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    said=$(grep -E '^=+ .*(passed|failed|error|no tests ran).* =+$' "$log" | tail -n 1 | tr -d '=' | xargs)
    # An interpreter that dies at its end has passed its tests before.
    [ "$status" -le 128 ] || said="ended by signal $((status - 128)) after: ${said:-no summary}"
    return "$status"
}

for version in $PYTHONS; do
    # Asked for its version, as a name on PATH may stand for a Python that is not there.
    found=$("python$version" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2> /dev/null)
    if [ -z "$found" ]; then
        table+="$version"$'\t'"not installed"$'\n'
        continue
    fi
    echo "== Python $found"
    tried=$((tried + 1))
    one "$version" || failed=$((failed + 1))
    table+="$version"$'\t'"$found: $said"$'\n'
done
printf '\nPython\t\n%s' "$table" | expand -t 10
if [ "$tried" = 0 ]; then
    echo "none of $PYTHONS is installed as pythonVERSION on PATH: install one, or name others by PYTHONS=\"3.12 3.13\"" >&2
    exit 1
fi
[ "$failed" = 0 ]
