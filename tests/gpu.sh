#!/bin/sh
# Everything that only a GPU can tell, in one call: builds both twins, runs each part of test_cuda,
# test_gemm and test_mla in a process of its own under a timeout, compares answers of tiny-r1 with
# the C twin's, runs the same on few rows under compute-sanitizer, and the benches. The table stands
# last; logs are in build/cuda/logs. tests/gpu.sh PART.. does only those. Loading is timed with files
# of 7 GB, in build/load.
cd "$(dirname "$0")/.." || exit 1
logs=build/cuda/logs
table= failed=0
mkdir -p $logs

# part NAME SECONDS COMMAND..: runs it, keeps its output, and adds its last line to the table.
part() {
    name=$1 seconds=$2 start=$(date +%s)
    shift 2
    [ -z "$only" ] || case " $only " in *" $name "*) ;; *) return ;; esac
    timeout -k 5 "$seconds" "$@" >$logs/$name 2>&1
    status=$?
    [ $status -eq 0 ] || { failed=1; grep -v '^note' $logs/$name | tail -n 15; }
    table="$table
$name: status $status, $(($(date +%s) - start)) s: $(tail -n 1 $logs/$name | cut -c 1-120)"
}

answers='
ask="run --model-path tiny-r1 --temperature 0"
[ "$(nvidia-smi -L | wc -l)" -lt 2 ] || ranks="--tp 2"
for question in "How many r are there in strawberry ?" "How many e are there in cheese ?" \
    "Which is larger, 9.11 or 9.8 ?" "What is 127 + 395 ?" "Spell banana backwards" "Hello !" \
    "Who was the first emperor of Rome ?"; do
    build/cuda/r1 $ask $ranks "$question" >build/cuda/logs/gpu_answer &&
    build/r1 $ask "$question" >build/cuda/logs/cpu_answer &&
    cmp build/cuda/logs/gpu_answer build/cuda/logs/cpu_answer || exit 1
done
echo "7 answers are the same $ranks"'

# All layers of a rank of eight where they fit; and the memory that was planned must be what it took.
share='
layers=61
[ "$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1)" -gt 120000 ] ||
    layers=40
build/cuda/r1 bench --offline --model-path tests/golden/r1 --tp 8 --layers $layers --profile \
    >build/cuda/logs/share_table || exit 1
grep -E "^(NV|meas|weights|memory|step|decode|prefill)" build/cuda/logs/share_table | sed "s/^/note: /"
awk "/^memory, planned/ { plan = \$4 + \$7 + \$10; taken = \$13 }
    END { off = taken / plan - 1
          printf \"%.2f GB of memory planned, %.2f GB taken\\n\", plan, taken
          exit !(off > -0.01 && off < 0.01) }" build/cuda/logs/share_table'

# Steps are recorded before any other has run, also with several ranks; then all sizes are asked for.
serve='
[ "$(nvidia-smi -L | wc -l)" -lt 2 ] || ranks="--tp 2"
log=build/cuda/logs/serve_log
build/cuda/r1 serve --model-path tiny-r1 --host 127.0.0.1 --port 0 --skip-server-warmup $ranks \
    2>$log & pid=$!
for i in $(seq 100); do grep -q "ready to roll" $log && break; sleep 0.2; done
port=$(sed -n "s/.* running on http:..127.0.0.1:\([0-9]*\).*/\1/p" $log)
build/cuda/r1 bench --port "$port" --tokenizer tiny-r1 --num-prompts 300 --random-input-len 64 \
    --random-output-len 64 --disable-tqdm --output-file build/cuda/logs/serve_jsonl || exit 1
kill $pid
wait $pid || exit 1
grep "Capture cuda graph end" $log'

# A step in the server beside the same step in bench --offline: the difference is what the server costs
# it and, with several ranks, their sums. Of the lines about decoding the first is left out, whose time
# has prompts in it.
steps='
logs=build/cuda/logs batch=$(echo $rows | tr " " ,)
build/cuda/r1 bench --offline --model-path $model --tp $ranks --batch $batch --context 1024 \
    --prefill 1024,4096 >$logs/$name.table || exit 1
build/cuda/r1 serve --model-path $model --tokenizer-path tiny-r1 $load --tp $ranks --host 127.0.0.1 \
    --port 0 2>$logs/$name.log & pid=$!
for i in $(seq 150); do grep -q "ready to roll" $logs/$name.log && break; sleep 0.2; done
port=$(sed -n "s/.* running on http:..127.0.0.1:\([0-9]*\).*/\1/p" $logs/$name.log)
ask() {
    build/cuda/r1 bench --port "$port" --tokenizer tiny-r1 --num-prompts $1 --disable-tqdm \
        --random-input-len $2 --random-output-len $3 --random-range-ratio 1 \
        --extra-request-body "{\"sampling_params\": {\"temperature\": 0.6, \"top_p\": 0.95,
            \"max_new_tokens\": $3, \"ignore_eos\": true}}" --output-file $logs/$name.jsonl
}
for n in $rows; do
    ask $n 896 256 >$logs/$name.bench || exit 1
    awk -v rows=$n -F "[ ,:]+" "/Decode batch/ {
            for (i = 1; i < NF; i++) {
                if (\$i == \"#running-req\") running = \$(i + 1)
                if (\$i == \"(token/s)\" && running > 0.9 * rows && running <= rows && k++)
                    server += 1e6 * running / \$(i + 1) } }
        \$1 == \"decode\" && \$2 == rows { step = 1e6 * rows / \$NF }
        END { if (k > 1) server /= k - 1
              printf \"note: %d rows: %.0f us in the server, %.0f us offline\n\", rows, server, step
              exit !(server > 0 && step > 0) }" $logs/$name.table $logs/$name.log || exit 1
done
for n in 1024 4096; do
    ask 1 $n 1 >$logs/$name.bench || exit 1
    awk -v rows=$n "\$1 == \"prefill\" && \$2 == rows { step = \$9 } /^Median TTFT/ { server = \$4 }
        END { printf \"note: prompt of %d: %.2f ms in the server, %.2f ms offline\n\", rows, server, step
              exit !(server > 0 && step > 0) }" $logs/$name.table $logs/$name.bench || exit 1
done
kill $pid
wait $pid && echo "the server and bench --offline: $(echo $rows | wc -w) steps, 2 prompts"'
host="export CUDA_VISIBLE_DEVICES=0; name=host model=tiny-r1 ranks=1 rows='1 256' load=; $steps"

# Two ranks with twelve layers of R1: 57 GB on each.
pair="[ \$(nvidia-smi -L | wc -l) -ge 2 ] || { echo skipped: one GPU; exit 0; }
mkdir -p build/r1-12
sed 's/\"num_hidden_layers\": 61/\"num_hidden_layers\": 12/' tests/golden/r1/config.json \
    >build/r1-12/config.json
name=pair model=build/r1-12 ranks=2 rows='1 8 64' load='--load-format dummy'; $steps"

# Two nodes on this machine, with a GPU each: the CPU's answer, and both end well. And one GPU can't be
# two ranks.
nodes='
logs=build/cuda/logs r1=${R1:-build/cuda/r1} port=$((20000 + $$ % 20000))
start() {
    CUDA_VISIBLE_DEVICES=$1 $r1 serve --model-path tiny-r1 --host 127.0.0.1 --port $((port + 1 + $1)) \
        --tp 2 --nnodes 2 --node-rank $1 --dist-init-addr 127.0.0.1:$port 2>$logs/node$1 &
}
CUDA_VISIBLE_DEVICES=0 build/cuda/r1 run --model-path tiny-r1 --tp 2 Hello 2>&1 |
    grep "got 1 GPUs, want 2" || exit 1
[ "$(nvidia-smi -L | wc -l)" -ge 2 ] || exit 0
start 1; worker=$!
start 0; leader=$!
for i in $(seq 150); do grep -q "ready to roll" $logs/node0 && break; sleep 0.2; done
question="How many r are there in strawberry ?"
curl -s http://127.0.0.1:$((port + 1))/v1/chat/completions -d "{\"model\":\"x\",\"temperature\":0,
    \"messages\":[{\"role\":\"user\",\"content\":\"$question\"}]}" |
    python3 -c "import json, sys; print(json.load(sys.stdin)[\"choices\"][0][\"message\"][\"content\"])" \
    >$logs/gpu_answer
build/r1 run --model-path tiny-r1 --temperature 0 "$question" 2>/dev/null >$logs/cpu_answer
cmp $logs/gpu_answer $logs/cpu_answer || exit 1
kill $leader
wait $leader && wait $worker && echo "two nodes answer and end: $(grep NCCL $logs/node0 | head -n 1)"'

# Loading from a disk, whose speed changes: in turns with a plain read of the same files. And from
# memory, which shows what the rest could do.
loads='
dir=build/load memory=/dev/shm/r1-load
load() {
    build/cuda/r1 run --model-path $1 --tokenizer-path tiny-r1 --max-total-tokens 256 \
        --max-tokens 1 Hello 2>&1 >build/cuda/logs/load_answer | sed -n "s/.*Load weight: //p"
}
trap "rm -rf $memory" EXIT
python3 tests/load.py write $dir || exit 1
for turn in 1 2 3; do
    echo "note: plainly, 16 threads: $(python3 tests/load.py read $dir)"
    echo "note: r1 from the disk:    $(load $dir)"
done
cp -r $dir $memory && echo "note: r1 from memory:      $(load $memory)"
[ "$(grep -c "r1 from.*GB/s" build/cuda/logs/loads)" = 4 ] && echo "4 loads"'

# The tests with kernels.cu as racecheck understands it: see ARRIVING there.
race='
mkdir -p build/race/tests && cp Makefile chat.html *.c *.h build/race &&
cp tests/*.c tests/*.cu tests/*.h build/race/tests &&
sed "s/ARRIVING = 1 /ARRIVING = 32 /" kernels.cu >build/race/kernels.cu &&
! cmp -s kernels.cu build/race/kernels.cu || exit 1
make -C build/race CUDA=1 -j"$(nproc)" build/cuda/test_cuda build/cuda/test_gemm build/cuda/test_mla'

only="$*"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
part build 400 make CUDA=1 -j"$(nproc)" build/cuda/r1 build/cuda/test_cuda build/cuda/test_gemm \
    build/cuda/test_mla build/cuda/test_slices_cuda build/cuda/test_oracle_cuda
part build_cpu 100 make CUDA=0 -j"$(nproc)" build/r1
small="cuda_place cuda_steps cuda_rows cuda_routes cuda_sample mla_query mla_value mla_attend \
    mla_prompts gemm_linear gemm_product gemm_mlp gemm_experts"  # those that checkers do few rows of
for test in $small cuda_draws mla_graph cuda_model cuda_talks; do
    part $test 60 build/cuda/test_${test%_*} ${test#*_}
done
part oracle 60 build/cuda/test_oracle_cuda
part slices 60 build/cuda/test_slices_cuda
part answers 60 sh -c "$answers"
part share 120 sh -c "$share"
part serve 60 sh -c "$serve"
part host 60 sh -c "$host"
part pair 120 sh -c "$pair"
part nodes 60 sh -c "$nodes"
part loads 120 sh -c "$loads"
part cuda_files 60 build/cuda/test_cuda files
rm -rf build/load
part memcheck_run 60 compute-sanitizer --error-exitcode 9 build/cuda/r1 run --model-path tiny-r1 \
    --max-total-tokens 1024 --max-tokens 3 "How many r are there in strawberry ?"
for test in $small cuda_draws; do
    part memcheck_$test 60 compute-sanitizer --error-exitcode 9 build/cuda/test_${test%_*} \
        ${test#*_} 2
done
part race_build 400 sh -c "$race"
for test in $small; do
    part racecheck_$test 60 compute-sanitizer --tool racecheck --error-exitcode 9 \
        build/race/build/cuda/test_${test%_*} ${test#*_} 2
done
for name in cuda gemm mla; do part bench_$name 60 build/cuda/test_$name bench; done
part bench_layer 60 build/cuda/test_cuda bench_layer
grep -h "^note" $logs/cuda_model $logs/cuda_talks $logs/cuda_files $logs/loads $logs/slices \
    $logs/host $logs/pair $logs/share $logs/bench_* 2>/dev/null
echo "$table"
exit $failed
