#!/bin/sh
# Runs test programs one after the other, prints each one's last line, and adds the three numbers up. A
# program that fails, crashes or says nothing counts as a failure, and its output is shown. Python is
# no must: without it, tests in Python are skipped.
passed=0 failed=0 skipped=0
for program in "$@"; do
    case $program in
    *.py) if ! command -v python3 >/dev/null; then
              echo "$(basename "$program"): skipped: there is no python3"
              skipped=$((skipped + 1))
              continue
          fi
          output=$(python3 "$program" 2>&1) ;;
    *) output=$("$program" 2>&1) ;;
    esac
    status=$?
    last=$(printf '%s\n' "$output" | tail -n 1)
    set -- $(printf '%s\n' "$last" | sed -n 's/^\([0-9]*\) passed, \([0-9]*\) failed, \([0-9]*\) skipped$/\1 \2 \3/p')
    if [ $# -ne 3 ]; then
        set -- 0 1 0
    elif [ $status -ne 0 ] && [ "$2" -eq 0 ]; then
        set -- "$1" 1 "$3"
    fi
    passed=$((passed + $1)) failed=$((failed + $2)) skipped=$((skipped + $3))
    echo "$(basename "$program"): $last"
    if [ "$2" -ne 0 ]; then
        printf '%s\n' "$output" | tail -n 40
        echo "$program: exit status $status"
    else
        printf '%s\n' "$output" | grep '^skipped: \|^note: '
    fi
done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
