#!/usr/bin/env bash
# Compile all of csrc/ as CUDA, GPU or not, against the headers of the oldest torch that the build serves and of .venv's.
#
# A wheel of torch holds its headers under torch/include. The oldest's is fetched once, by pip, and only its headers are
# kept, in ${XDG_CACHE_HOME:-~/.cache}/vllm-easyspec. Where it can't be had, that half is left out and said so; with
# LINT_OLDEST_TORCH=required it is an error.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
oldest=2.11.0 # setup.py's TORCH_TARGET_VERSION
target=$(sed -n 's/^TORCH_TARGET_VERSION = "\(.*\)".*/\1/p' setup.py)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/vllm-easyspec/torch-$oldest

fetch_oldest() {
    [[ -e $cache/include ]] && return
    local scratch
    mkdir -p "$cache" && scratch=$(mktemp -d "$cache/fetch.XXXX") || return
    # macOS's wheel, since it is a CPU build in every index and a sixth of the size; only headers are taken from it.
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version=3.11 \
        --platform=macosx_11_0_arm64 --dest "$scratch" "torch==$oldest" &&
        "$python" -m zipfile -e "$scratch"/torch-*.whl "$scratch/wheel" &&
        mv -T "$scratch/wheel/torch/include" "$cache/include"
    local failed=$?
    rm -rf "$scratch"
    return $failed
}

compile() { # version, folder of headers
    echo "lint: csrc/ as CUDA against torch $1"
    # The host compiler's flags are setup.py's; -Werror all-warnings is for our sources, so torch's headers are system's.
    local gpus=(-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90)
    local source
    for source in csrc/*.cpp csrc/*.cu; do
        nvcc -std=c++20 -Werror all-warnings "${gpus[@]}" -DEASYSPEC_CUDA -DUSE_CUDA "-DTORCH_TARGET_VERSION=$target" \
            "-Xcompiler=-fPIC,-fopenmp-simd,-Wall,-Wno-psabi${host_flags:-}" -isystem "$2" -c "$source" -o /dev/null
    done
}

[[ $(uname -m) != x86_64 ]] || host_flags=,-march=x86-64-v3
if fetch_oldest; then
    compile "$oldest" "$cache/include"
elif [[ ${LINT_OLDEST_TORCH:-} == required ]]; then
    echo "lint: pip can't fetch torch $oldest, whose headers csrc/ must compile against" >&2
    exit 1
else
    echo "lint: pip can't fetch torch $oldest, csrc/ not compiled against its headers"
fi
newest=$("$python" -c 'import importlib.metadata as m; print(m.version("torch"))')
compile "$newest" "$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')/include"
