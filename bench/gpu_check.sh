#!/usr/bin/env bash
# Builds, tests, trains, sanitizes and times everything that needs a GPU, and writes one page about it.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

usage() {
    cat <<'TEXT'
usage: bench/gpu_check.sh [all|build|test|train|sanitize|bench|summary]... [options]

  all        the parts below in this order, then the summary (the default)
  build      pip install . --no-build-isolation --no-deps into an environment of its own
  test       pytest -m gpu: every backend of every op against float64
  train      20 steps in bfloat16 of two shrunken presets with all mixers
  sanitize   compute-sanitizer over each kernel once
  bench      time, rates and ratios per op, into bench/results/<gpu>.jsonl
  summary    write summary.md from what there is

  --wheels DIR      a folder of wheels for what is missing (bench/README.md has the command that fills it)
  --out DIR         copy the results here too (default: $OUT, if set)
  --budget SECONDS  time for all parts together (default 520); a part that is cut short goes on at the next call
  --force           run parts again that were finished for these sources on this GPU
  -h, --help        this text

A part that was finished for the same sources, GPU and versions is not run again. No network is used. Environment:

  PYTHON            the interpreter, python3 by default; it needs torch, triton, pytest and pyyaml
  GPU_CHECK_DIR     where results and the built environment are kept, build/gpu_check by default

exit status: 0 all well; 1 a part failed or is incomplete; 2 wrong usage; 77 no GPU: only what needs none was run
TEXT
}

die() {
    printf 'gpu_check.sh: %s\n\n' "$1" >&2
    usage >&2
    exit 2
}

PARTS=(build test train sanitize bench)
asked=() wheels="" out="${OUT:-}" budget=520 force=no
while (($#)); do
    case $1 in
        all | build | test | train | sanitize | bench | summary) asked+=("$1") ;;
        --wheels | --out | --budget)
            (($# > 1)) || die "$1 needs a value"
            case $1 in
                --wheels) wheels=$2 ;;
                --out) out=$2 ;;
                --budget) budget=$2 ;;
            esac
            shift
            ;;
        --force) force=yes ;;
        -h | --help) usage && exit 0 ;;
        *) die "unknown argument '$1'" ;;
    esac
    shift
done
[[ $budget =~ ^[1-9][0-9]*$ ]] || die "--budget is '$budget'; it must be a whole number of seconds"
[[ -z $wheels || -d $wheels ]] || die "--wheels: no folder '$wheels'"
[[ ${#asked[@]} -gt 0 ]] || asked=(all)
[[ " ${asked[*]} " != *" all "* ]] || asked=("${PARTS[@]}" summary)

work=${GPU_CHECK_DIR:-build/gpu_check}
mkdir -p "$work" ${out:+"$out"} || exit 1
work=$(realpath "$work")
outcomes=$work/outcomes.jsonl
# This tree first, and nothing of the user's environment that would steer the ops.
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
unset ULTRA_BACKEND TRITON_INTERPRET PYTEST_ADDOPTS
python=${PYTHON:-python3}

if ! "$python" -m bench.machine "$work/machine.json" >"$work/machine.txt" 2>"$work/machine.log"; then
    printf 'gpu_check.sh: %s cannot import torch: %s\n' "$python" "$(tail -n 1 "$work/machine.log")" >&2
    exit 1
fi
{ read -r gpu && read -r slug && read -r key; } <"$work/machine.txt"
# What was found for other sources, another card or other versions says nothing about these.
if [[ $(cat "$work/key" 2>/dev/null) != "$key" ]]; then
    rm -f "$work"/*.log "$work"/*.jsonl
    printf '%s\n' "$key" >"$work/key"
fi
touch "$outcomes"
printf '%s, results in %s\n' "${gpu:-no GPU}" "$work"

began=$SECONDS
left() { echo $((budget - (SECONDS - began))); }

# --- helpers of the parts: `part_end` is the second at which the part must end ---

reason="" # why a part was skipped, or what a passed part has to say

limited() { # command...: under the part's time limit; 124 when it is reached
    local seconds=$((part_end - SECONDS))
    ((seconds > 0)) || return 124
    timeout --signal=INT --kill-after=15 "$seconds" "$@"
    local status=$?
    ((status == 137)) && status=124 # had to be killed
    return $status
}

venv_python() { # the interpreter of the environment that `build` makes, else the one that was given
    if [[ -x $work/venv/bin/python ]]; then echo "$work/venv/bin/python"; else echo "$python"; fi
}

missing() { # module...: prints those that cannot be imported
    "$(venv_python)" -c 'import importlib.util as u, sys
print(*(m for m in sys.argv[1:] if u.find_spec(m) is None))' "$@"
}

environment() { # an environment that sees this interpreter's packages, also when that is in an environment itself
    local of
    of=$("$python" -c 'import sys; print(sys.executable, sys.version)') || return
    [[ $(cat "$work/venv/of" 2>/dev/null) != "$of" ]] || return 0
    "$python" -m venv --clear --without-pip "$work/venv" || return
    "$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
        >"$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth" || return
    printf '%s\n' "$of" >"$work/venv/of"
}

from_wheels() { # what for, module=package...: installs the packages of missing modules from --wheels; 1 if some stay missing
    local purpose=$1 pair absent packages=()
    shift
    absent=" $(missing "${@%%=*}") "
    [[ $absent =~ [^\ ] ]] || return 0
    for pair in "$@"; do
        [[ $absent == *" ${pair%%=*} "* ]] && packages+=("${pair##*=}")
    done
    reason="${packages[*]} missing for $purpose"
    if [[ -z $wheels ]]; then
        reason+="; give --wheels"
        return 1
    fi
    environment || return 1
    if ! limited "$(venv_python)" -m pip install --no-index --find-links "$wheels" "${packages[@]}"; then
        reason+=", and not all in $wheels"
        return 1
    fi
    reason=""
}

pytest_part() { # part, pytest arguments...: goes on in a new process when a kernel has broken the CUDA context or crashed
    local part=$1 status lines
    shift
    while :; do
        lines=$(wc -l <"$outcomes")
        limited "$(venv_python)" -m pytest -q -rs -o "cache_dir=$work/pytest_cache" -p bench.pytest_outcomes \
            --outcomes "$outcomes" --outcomes-part "$part" "$@"
        status=$?
        # 86: the plugin ended it; above 128: a signal did. Without a new line it would happen again.
        ((status == 86 || status > 128)) || break
        (($(wc -l <"$outcomes") > lines)) || break
        echo "--- exit status $status: going on in a new process"
    done
    ((status == 5)) && status=0 # nothing left to run
    # A process that went on with an interrupted part has not seen the failures before it.
    if ((status == 0)) && ! "$python" bench/outcomes.py "$outcomes" clean "$part"; then status=1; fi
    return $status
}

last_error() { # log: its last line that names an error, else its last line
    grep -oE '[A-Za-z]*(Error|error): .*' "$1" | tail -n 1 | grep . || tail -n 1 "$1"
}

collect() { # pytest arguments...: what would run
    limited "$(venv_python)" -m pytest -q -o "cache_dir=$work/pytest_cache" --collect-only "$@"
}

# --- the parts: 0 passed, 77 skipped for $reason, 124 out of time, otherwise failed ---

run_build() {
    environment || return
    from_wheels "the build" setuptools=setuptools pip=pip pybind11=pybind11 ninja=ninja
    local lacking=$reason
    reason=""
    # version and file names stay the same: without --force-reinstall an older build would be kept
    limited "$work/venv/bin/python" -m pip install . \
        --no-build-isolation --no-deps --no-index --force-reinstall || return
    reason=$(cd / && PYTHONPATH='' "$work/venv/bin/python" "$OLDPWD/bench/built.py") || return
    reason+=${lacking:+ ($lacking)}
}

run_test() {
    local tests=(tests/ops tests/gpu --ignore tests/gpu/test_training.py -m gpu)
    if [[ -z $gpu ]]; then
        collect "${tests[@]}" || return
        reason="no GPU; the tests collect"
        return 77
    fi
    pytest_part test "${tests[@]}"
}

run_train() {
    from_wheels "training" numpy=numpy pydantic=pydantic tokenizers=tokenizers safetensors=safetensors \
        filelock=filelock tqdm=tqdm || return 77
    if [[ -z $gpu ]]; then
        collect tests/gpu/test_training.py -m gpu || return
        reason="no GPU; the tests collect"
        return 77
    fi
    pytest_part train tests/gpu/test_training.py -m gpu
}

run_sanitize() {
    local tool status=0 sanitizer found
    if [[ -z $gpu ]]; then
        limited "$(venv_python)" -m bench.each_kernel --list || return
        reason="no GPU; the kernels are listed"
        return 77
    fi
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null) || {
        reason="compute-sanitizer is not on this machine"
        return 77
    }
    for tool in memcheck racecheck; do
        # Without torch's caching every tensor is an allocation of its own, so that memcheck sees its ends.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 \
            "$(venv_python)" -m bench.each_kernel
        found=$?
        "$python" bench/outcomes.py "$outcomes" tool sanitize "$tool" $found
        ((found == 0)) || status=$found
    done
    return $status
}

run_bench() {
    if [[ -z $gpu ]]; then
        collect bench || return
        reason="no GPU; the cells collect"
        return 77
    fi
    pytest_part bench bench --ultra-json "$work/$slug.jsonl" --ultra-seconds 0.1 --ultra-compile
    local status=$?
    cp "$work/$slug.jsonl" bench/results/ 2>/dev/null
    return $status
}

write_summary() {
    "$python" -m bench.gpu_summary "$work" "${PARTS[@]}" >"$work/summary.md" || return
    cat "$work/summary.md"
}

# --- running them ---

declare -A limit=([build]=150 [test]=240 [train]=100 [sanitize]=90 [bench]=180)
failed=no
for part in "${asked[@]}"; do
    [[ $part != summary ]] || continue
    before=$("$python" bench/outcomes.py "$outcomes" status "$part")
    if [[ $force == no && ($before == passed || $before == failed) ]]; then
        printf '%-9s %s before, for the same sources on this GPU (--force runs it again)\n' "$part" "$before"
        [[ $before == passed ]] || failed=yes
        continue
    fi
    if [[ $force == yes ]]; then
        "$python" bench/outcomes.py "$outcomes" forget "$part"
        rm -f "$work/$part.log"
        [[ $part != bench ]] || rm -f "$work/$slug.jsonl"
    fi
    started=$SECONDS reason=""
    part_end=$((SECONDS + (limit[$part] < $(left) ? limit[$part] : $(left))))
    if ((part_end <= SECONDS)); then
        status=124
    else
        "run_$part" >>"$work/$part.log" 2>&1
        status=$?
    fi
    case $status in
        0) result=passed ;;
        77) result=skipped ;;
        124) result=incomplete reason="out of time; call again to go on" ;;
        *) result=failed reason="exit status $status, $(last_error "$work/$part.log")" ;;
    esac
    [[ $result == passed || $result == skipped ]] || failed=yes
    "$python" bench/outcomes.py "$outcomes" add "$part" "$result" $((SECONDS - started)) "$reason"
    printf '%-9s %s in %d s%s\n' "$part" "$result" $((SECONDS - started)) "${reason:+: $reason}"
done

if [[ " ${asked[*]} " == *" summary "* ]]; then write_summary || failed=yes; fi
# Few and flat files: what brings them back from a borrowed machine may take no more.
if [[ -n $out && ! $out -ef $work ]]; then
    cp "$work"/*.log "$work"/*.jsonl "$work"/*.md "$out"/ 2>/dev/null
    rm -f "$out/machine.log"
fi
[[ $failed == no ]] || exit 1
[[ -n $gpu ]] || exit 77
