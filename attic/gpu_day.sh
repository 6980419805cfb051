#!/usr/bin/env bash
# What to do with a GPU for ten minutes, in order of worth: CUDA tests, benchmarks, reference run.
#
#     bash attic/gpu_day.sh /tmp/gpu-day                        # nine minutes
#     ONLY='compiled|run' bash attic/gpu_day.sh /tmp/more       # parts whose names match
#     RUN=work/reference DATA=work/data bash attic/gpu_day.sh   # continues the run in RUN
#     SMALL=1 bash attic/gpu_day.sh /tmp/try                    # tries this script on a CPU
#
# Each part writes FOLDER/PART.log, and a line in FOLDER/summary.txt with its exit code and seconds.
# FOLDER is the first argument, $OUT, or work/gpu-day. A part that fails or reaches its time limit
# (exit code 124) does not stop the others. Parts are skipped if less than half of their time limit
# is left until $DEADLINE (seconds from the start, default 540).
set -u
SECONDS=0
cd "$(dirname "$0")/.." || exit
out=${1:-${OUT:-work/gpu-day}}
small=${SMALL:-} only=${ONLY:-.} deadline=${DEADLINE:-540} reserve=0
data=${DATA:-work/data} run=${RUN:-$out/run}
python=${PYTHON:-.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
export PYTHONUNBUFFERED=1
mkdir -p "$out" || exit
trap 'echo; cat "$out/summary.txt"' EXIT

part() {  # part NAME LIMIT SIGNAL COMMAND...: SIGNAL after LIMIT seconds, KILL 15 seconds later
    local name=$1 limit=$2 signal=$3 begin=$SECONDS left=$((deadline - reserve - SECONDS)) code
    shift 3
    [[ $name =~ $only ]] || return
    if ((2 * left < limit)); then
        printf '%-22s skipped: %d s left\n' "$name" "$left" | tee -a "$out/summary.txt"
        return
    fi
    # background jobs ignore SIGINT, and Python would inherit that
    timeout -s "$signal" -k 15 $((limit < left ? limit : left)) env --default-signal=INT "$@" \
        > "$out/$name.log" 2>&1 < /dev/null
    code=$?
    tail -n 12 "$out/$name.log"
    printf '%-22s exit %3d %4d s\n' "$name" $code $((SECONDS - begin)) | tee -a "$out/summary.txt"
}

bench() {  # bench NAME LIMIT FLAGS...
    part "$1" "$2" INT "$python" bench.py --csv "$out/$1.csv" "${@:3}"
}

both() {  # both NAME LIMIT FLAGS...: for DenseNet-BC-100-12 and DenseNet-121
    bench "$1-bc-100" "$2" "${cifar[@]}" "${measure[@]}" "${@:3}"
    bench "$1-121" "$2" "${imagenet[@]}" "${measure[@]}" "${@:3}"
}

workers=4 compile_limit=120 threads=(1 2 4 8 16)
measure=(--device cuda --precision bf16 --rounds 3 --steps 10)
cifar=() imagenet=(--arch densenet121 --batch-size 256)
cpu=(--depth 40 --rounds 3 --precision fp32)
grep -q avx512_bf16 /proc/cpuinfo && cpu+=(bf16)  # far too slow without these instructions
network=(--dataset cifar10 --data "$data" --epochs 100 --lr-schedule cosine --seed 1)
if [[ $small ]]; then
    workers=0 compile_limit=20 threads=(1 2) deadline=${DEADLINE:-180}
    measure=(--device cpu --precision fp32 --rounds 1)
    cifar=(--depth 10 --growth-rate 4 --batch-size 4) cpu=("${cifar[@]}" --rounds 1)
    imagenet=(--arch densenet121 --image-size 65 --batch-size 1)
    network=(--dataset shapes --depth 10 --growth-rate 4 --epochs 100 --device cpu)
fi

{
    git log -1 --format='commit %h, %cs' 2>&1 | head -n 1
    nvidia-smi -L 2> /dev/null || echo 'no GPU'
    "$python" -c 'import os, torch, torchvision as tv
print(f"torch {torch.__version__}, torchvision {tv.__version__}, {os.cpu_count()} cores")' 2>&1
} | tee "$out/summary.txt"

mapfile -t files < <(grep -l 'mark\.cuda' tests/test_*.py)
tests=("$python" -m pytest "${files[@]}" -m cuda -n $workers --durations 10 -k)
slow='test_resume or test_bench or learns_the_shapes or out_of_gpu_memory'
part tests-fast 90 INT "${tests[@]}" "not ($slow)"
part tests-slow 100 INT "${tests[@]}" "$slow"

both bench 60 --rows 'torchvision plain' 'ours plain' 'ours plain, CUDA graph' \
    'torchvision fused*' 'ours fused, memory-efficient*'
reserve=60  # for cpu-*; one row per part, because a SIGINT in torch.compile may abort the process
both compiled $compile_limit --compile --rows 'torchvision plain' \
    'torchvision plain, compiled (default)'
both compiled-graph $compile_limit --compile --rows 'torchvision plain' \
    'torchvision plain, compiled (reduce-overhead)'
both compiled-ours $compile_limit --compile --rows 'ours plain' 'ours plain, CUDA graph' \
    'ours plain, compiled (default), CUDA graph'
reserve=0

for n in "${threads[@]}"; do
    ((n <= $(getconf _NPROCESSORS_ONLN))) || continue
    OMP_NUM_THREADS=$n bench "cpu-$n" 40 --device cpu "${cpu[@]}" \
        --rows 'torchvision plain' 'ours fused' 'ours fused, memory-efficient'
done

left=$((deadline - SECONDS))
if [[ $small || -d $data/cifar-10-batches-bin || -d $data/cifar-10-batches-py ]]; then
    part run $((left > 30 ? left : 30)) TERM \
        "$python" train.py "${network[@]}" --save "$run" --resume
else
    echo "run                    skipped: no CIFAR-10 in $data" | tee -a "$out/summary.txt"
fi
