#!/usr/bin/env bash
# The one door: ./launch.sh stage=all|sft|collect|rm|ppo|evaluate|exposure|bench|test [key=value ...]
# Makes the Python environment on first use, then runs the stage. Works with bash 3.2.
set -eu

say() { printf '%s\n' "$*" >&2; }
fail() {
  say "error: $*"
  exit 2
}

project_folder() {
  local file=$1 target
  while [ -L "$file" ]; do
    target=$(readlink "$file")
    case $target in
      /*) file=$target ;;
      *) file=$(dirname "$file")/$target ;;
    esac
  done
  (cd "$(dirname "$file")" && pwd -P)
}

is_supported() {
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

# Prints the Python to use: the active environment's, else the one of .venv, made on first use.
choose_environment() {
  environment=${VIRTUAL_ENV:-}
  # conda's base environment belongs to conda: not ours to install into
  if [ -z "$environment" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
    environment=${CONDA_PREFIX:-}
  fi
  if [ -n "$environment" ]; then
    owner=user
    python=$environment/bin/python
    [ -x "$python" ] || fail "the active environment $environment has no bin/python: deactivate it"
    is_supported "$python" || fail "the active environment $environment has Python" \
      "$("$python" -c 'import platform; print(platform.python_version())'), 3.10 to 3.13 is needed:" \
      "deactivate it and ./launch.sh makes its own"
    return
  fi
  owner=project
  environment=$project/.venv
  python=$environment/bin/python
  if [ ! -x "$python" ] || { [ ! -f "$environment/$stamp_name" ] && ! "$python" -m pip --version >/dev/null 2>&1; }; then
    make_environment
  fi
}

make_environment() {
  local candidate base=
  for candidate in python3.13 python3.12 python3.11 python3.10 python3 python; do
    if command -v "$candidate" >/dev/null 2>&1 && is_supported "$candidate"; then
      base=$candidate
      "$base" -c 'import ensurepip, venv' >/dev/null 2>&1 && break
    fi
  done
  [ -n "$base" ] || fail "no Python 3.10 to 3.13 found: install one from python.org or your package manager"
  "$base" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
    fail "$base cannot make environments: install its venv module (Debian, Ubuntu: apt install python3-venv)"
  say "making the environment $environment with $("$base" --version)"
  "$base" -m venv --clear "$environment" || fail "could not make $environment: see above"
}

imports_are_there() {
  "$python" - "$1" <<'PYTHON'
import importlib.util, sys
needed = "accelerate bitsandbytes datasets filelock gguf huggingface_hub hydra matplotlib numpy omegaconf peft psutil rouge_score sacrebleu safetensors sklearn"
needed += " tensorboard tokenizers torch tqdm transformers trl yaml"
if sys.argv[1] != "run":
    needed += " deepspeed"
if sys.argv[1] == "dev":
    needed += " mauve mypy pytest ruff xdist"
missing = [name for name in needed.split() if importlib.util.find_spec(name) is None]
if missing:
    print("not installed yet:", " ".join(missing), file=sys.stderr)
sys.exit(bool(missing))
PYTHON
}

# Installs what is missing. The stamp, written last, says which pins an environment was made from.
install() {
  local wanted stamp extras=.
  wanted=$(cat "$project/constraints.txt" "$project/pyproject.toml" | cksum)
  for stamp in "$environment/$stamp_name"-dev "$environment/$stamp_name"-deepspeed "$environment/$stamp_name"; do
    case $need:$stamp in dev:*-deepspeed | dev:*"$stamp_name" | deepspeed:*"$stamp_name") continue ;; esac
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then return; fi
  done
  if [ "$owner" = user ] && imports_are_there "$need"; then return; fi
  [ "$need" = run ] || extras=".[$need]"

  say "installing into $environment (once; some minutes and gigabytes, most of them torch)"
  log=$environment/rlhf-pipeline-install.log
  pins=$environment/rlhf-pipeline-pins.txt
  write_pins >"$pins"
  run_pip "torch" torch
  run_pip "the other packages" -e "$extras"
  stamp=$environment/$stamp_name
  [ "$need" = run ] || stamp=$stamp-$need
  printf '%s\n' "$wanted" >"$stamp.part"
  mv "$stamp.part" "$stamp"
  say "installed"
}

# In an environment of the user's, what is there stays as it is: only new packages are pinned.
write_pins() {
  "$python" - "$owner" "$project/constraints.txt" <<'PYTHON'
import re, sys
from importlib import metadata

def is_there(name):
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True

owner, path = sys.argv[1:]
with open(path, encoding="utf-8") as file:
    for line in file:
        name = re.split(r"[=;#\s]", line.strip(), maxsplit=1)[0]
        if name and not (owner == "user" and is_there(name)):
            print(line.strip())
PYTHON
}

run_pip() {
  local title=$1 start=$SECONDS pid line status=0
  shift
  (cd "$project" && exec "$python" -m pip install --disable-pip-version-check --no-input --progress-bar off \
    -c "$pins" "$@") >"$log" 2>&1 &
  pid=$!
  trap 'kill "$pid" 2>/dev/null || true; say ""; say "interrupted; the next ./launch.sh goes on"; exit 130' INT TERM
  while kill -0 "$pid" 2>/dev/null; do
    sleep 1
    if [ -t 2 ]; then
      line=$(tail -n 1 "$log" | cut -c 1-60)
      printf '\r%-100s' "  $title: $((SECONDS - start)) s  $line" >&2
    fi
  done
  wait "$pid" || status=$?
  trap - INT TERM
  [ -t 2 ] && printf '\r%-100s\r' '' >&2
  if [ "$status" -ne 0 ]; then
    tail -n 15 "$log" >&2
    say "error: pip could not install $title (all of it in $log): check the network and the free space, then run again"
    exit 2
  fi
  say "  $title: done in $((SECONDS - start)) s"
}

# Runs the checks in the project folder; the words after stage=test go to pytest. Files of tests are shared out to
# processes (-n 0: one alone), at most four, as each makes a finished run to test with.
run_tests() {
  cd "$project"
  "$python" -m ruff check .
  "$python" -m ruff format --check .
  "$python" -m mypy
  workers=$("$python" -c 'import os; print(min(os.cpu_count() or 1, 4))')
  export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
  exec "$python" -m pytest -n "$workers" --dist loadfile "$@"
}

project=$(project_folder "$0")
stamp_name=rlhf-pipeline.stamp
need=run
help=
[ $# -gt 0 ] || help=yes
for word in ${1+"$@"}; do
  case $word in
    help | --help | -h) help=yes ;;
    stage=test) need=dev ;;
    engine=zero* | zero_processes=*) [ "$need" = dev ] || need=deepspeed ;;
  esac
done
if [ -n "$help" ]; then
  cat "$project/stages/help.txt"
  exit 0
fi

choose_environment
install

export PYTHONPATH="$project${PYTHONPATH:+:$PYTHONPATH}"
export TOKENIZERS_PARALLELISM=false
# glibc keeps the memory that it was given: asking for it anew in every pass costs a fifth of an update
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-8589934592}"
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-1073741824}" MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-67108864}"
# nothing calls home
export HF_HUB_DISABLE_TELEMETRY=1 DO_NOT_TRACK=1 DISABLE_TELEMETRY=1 ANONYMIZED_TELEMETRY=false

if [ "$need" = dev ]; then
  for word in "$@"; do # drop stage=test, keep the rest as it is
    shift
    [ "$word" = stage=test ] || set -- "$@" "$word"
  done
  run_tests ${1+"$@"}
fi
exec "$python" "$project/stages/__main__.py" "$@"
