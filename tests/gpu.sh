#!/bin/sh
# Everything that only a GPU can tell, in one call: builds, runs each part of test_cuda in a process
# of its own under a timeout, the same on few rows under compute-sanitizer, tiny-r1's answer, and the
# benches. The table stands last. Logs go to $OUT, else to build/cuda/logs.
cd "$(dirname "$0")/.." || exit 1
out=${OUT:-build/cuda/logs}
test=build/cuda/test_cuda
table= failed=0
mkdir -p "$out"

# part NAME SECONDS COMMAND..: runs it, keeps its output, and adds its last line to the table.
part() {
    name=$1 seconds=$2
    shift 2
    start=$(date +%s)
    timeout -k 5 "$seconds" "$@" >"$out/$name.log" 2>&1
    status=$?
    [ $status -eq 0 ] || { failed=1; grep -v '^note' "$out/$name.log" | tail -n 15; }
    table="$table
$name: status $status, $(($(date +%s) - start)) s: $(tail -n 1 "$out/$name.log" | cut -c 1-100)"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
part build 400 make CUDA=1 -j"$(nproc)" r1 $test
for name in place steps rows routes sample; do part "$name" 60 $test $name; done
for name in place steps rows routes sample; do
    part "memcheck_$name" 90 compute-sanitizer --error-exitcode 9 $test $name 3
done
for name in rows routes sample; do
    part "racecheck_$name" 90 compute-sanitizer --tool racecheck --error-exitcode 9 $test $name 1
done
part answer 60 ./r1 run --temperature 0 "How many r are there in strawberry ?"
part bench 60 $test bench
grep '^note' "$out/bench.log"
echo "$table"
exit $failed
