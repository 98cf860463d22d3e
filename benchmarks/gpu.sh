#!/usr/bin/env bash
# Measure this program on an NVIDIA GPU beside nanoGPT, and write the tables to gpu-results.md.
#
#   benchmarks/gpu.sh [FOLDER]         about half an hour on an A100; FOLDER (default: gpu-bench) is
#                                      made, and holds the environment, nanoGPT and the runs
#   benchmarks/gpu.sh --cpu [FOLDER]   the same commands with tiny sizes on a CPU, which tests this
#                                      script and measures nothing
#
# It needs Linux, a driver, git, curl, Python 3.11 or later with venv, and 15 GB of disk. Both
# programs train in bfloat16, compiled, with fused AdamW and torch's flash attention. PYTHON=PATH
# uses an environment that exists, NANOGPT=PATH a checkout of nanoGPT that exists.
set -euo pipefail

nanogpt_commit=3adf61e154c3fe3fca428ad6bc3818b27a3b8291
text_url=https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
text_sha256=86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed

on_cpu=
if [[ ${1:-} == --cpu ]]; then
    on_cpu=yes
    shift
fi
if [[ ${1:-} == -* ]]; then
    sed -n '2,11s/^# \{0,1\}//p' "$0"
    exit 2
fi
repository=$(cd "$(dirname "$0")/.." && pwd)
work=${1:-gpu-bench}
mkdir -p "$work"
work=$(cd "$work" && pwd)
cd "$work"
results=$work/gpu-results.md

fail() {
    echo "error: $1" >&2
    exit 2
}

# ---- the environment, nanoGPT and the text ----

python=${PYTHON:-$work/venv/bin/python}
if [[ ! -x $python ]]; then
    echo "installing into $work/venv" >&2
    python3 -m venv "$work/venv"
    "$python" -m pip install --quiet --upgrade pip
    "$python" -m pip install --quiet -r "$repository/requirements.txt"
fi
if [[ -z $on_cpu ]]; then
    "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' ||
        fail "torch finds no CUDA device; check nvidia-smi, or test this script with --cpu"
fi

nanogpt=${NANOGPT:-$work/nanoGPT}
if [[ ! -d $nanogpt ]]; then
    git clone --quiet https://github.com/karpathy/nanoGPT "$nanogpt"
fi
[[ -n ${NANOGPT:-} ]] || git -C "$nanogpt" checkout --quiet "$nanogpt_commit"

if [[ ! -f tinyshakespeare.txt ]]; then
    curl --fail --silent --show-error --location --output tinyshakespeare.part "$text_url" ||
        fail "cannot fetch $text_url; put the file at $work/tinyshakespeare.txt"
    mv tinyshakespeare.part tinyshakespeare.txt
fi
echo "$text_sha256  tinyshakespeare.txt" | sha256sum --check --quiet ||
    fail "$work/tinyshakespeare.txt is another text than char-rnn's; delete it"

# ---- the runs ----

char_keys=(data.path=tinyshakespeare.txt)
gpt2_keys=(training.seq_len=1024 training.micro_batch_size=12 training.grad_accum_steps=5
    training.weight_decay=0.1 data.document_mask=false)
bench=(--steps 200 --peer-steps 60 --repeat 3 --parts)
common=(training.precision=bf16-mixed hardware.compile=on hardware.accelerator=cuda)
train_keys=()
if [[ -n $on_cpu ]]; then
    tiny=(model.n_layers=2 model.d_model=64 model.n_heads=2 training.seq_len=32
        training.micro_batch_size=2 training.grad_accum_steps=1 data.val_share=0.001)
    bench=(--steps 5 --peer-steps 5 --repeat 1)
    common=(hardware.accelerator=cpu hardware.compile=off "${tiny[@]}")
    train_keys=(training.max_steps=5 training.val_every_steps=5 sampling.max_new_tokens=4)
fi

# Print a heading and a command, run it in the folder of results, and print what it prints.
section() {
    local title=$1
    shift
    echo "$title" >&2
    # shellcheck disable=SC2016 # the backquotes are Markdown's
    printf '\n## %s\n\n`python %s`\n\n```text\n' "$title" "${*#"$repository"/}"
    "$python" "$@"
    printf '```\n'
}

{
    echo "# This program and nanoGPT on one GPU"
    printf '\n%s, nanoGPT %s\n\n```text\n' "$(date -u +%F)" "$(git -C "$nanogpt" rev-parse --short HEAD)"
    if [[ -z $on_cpu ]]; then
        nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv
    else
        echo "a test of the script on a CPU: none of these numbers is a measurement"
    fi
    "$python" -c 'import platform, torch
print("Python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda)
print("flash attention:", torch.backends.cuda.flash_sdp_enabled())'
    printf '```\n'
    section "nanoGPT's 10.65 M model, 64 x 256 characters, dropout 0.2" \
        "$repository/bench.py" train --config "$repository/presets/shakespeare_char_gpu.yaml" \
        "${bench[@]}" --work "$work" --peer "nanogpt=$nanogpt" "${char_keys[@]}" "${common[@]}"
    section "GPT-2, 124 M, sequences of 1,024" \
        "$repository/bench.py" train --config "$repository/presets/gpt2_124m.yaml" \
        "${bench[@]}" --work "$work" --peer "nanogpt=$nanogpt" "${gpt2_keys[@]}" "${common[@]}"
    section "The whole run of shakespeare_char_gpu; nanoGPT's README: 1.4697 at its best" \
        "$repository/train.py" --config "$repository/presets/shakespeare_char_gpu.yaml" --fresh \
        "${char_keys[@]}" "${common[@]}" "${train_keys[@]}"
} > "$results.part"
mv "$results.part" "$results"
echo "wrote $results" >&2
