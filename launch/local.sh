#!/usr/bin/env bash
# Run a command in fm_jax's own environment on this machine; install it on first use.
#
#   ./launch/local.sh fm train --config=configs/quickstart.py
#   ./launch/local.sh pytest
#   ./launch/local.sh --processes=2 --devices_per_process=4 fm train ...
#
# --processes=N            run the command as N processes that find each other
# --devices_per_process=N  give each N simulated CPU devices
#
# FM_ACCELERATOR=cpu|cuda|tpu  which JAX to install; default: what is found here
# FM_EXTRAS=NAME,...           extras of pyproject.toml to install too, such as parity
# FM_VENV=DIR                  where to install; default: .venv beside the source
# FM_PYTHON=PYTHON             the Python to use, 3.11 or newer; default: what is found
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${FM_VENV:-$root/.venv}"
pins="$root/launch/constraints.txt"

fail() { echo "launch/local.sh: $*" >&2; exit 2; }

options=()
while [[ "${1:-}" == --* ]]; do
  case "$1" in
    --processes=* | --devices_per_process=*)
      [[ "${1#*=}" =~ ^[1-9][0-9]{0,3}$ ]] || fail "${1%%=*} must be a whole number from 1 to 9999; got '${1#*=}'." ;;
    *) fail "options must be --processes=N and --devices_per_process=N; got $1. The command's own options follow the command." ;;
  esac
  options+=("$1")
  shift
done
[ $# -gt 0 ] || fail "a command must be given. Example: ./launch/local.sh fm --help"

accelerator() {
  if [ -n "${FM_ACCELERATOR:-}" ]; then echo "$FM_ACCELERATOR"
  elif nvidia-smi -L >/dev/null 2>&1; then echo cuda
  # 0x1ae0 is Google's PCI vendor id: a TPU VM.
  elif grep -qs 0x1ae0 /sys/bus/pci/devices/*/vendor && ls /dev/accel* /dev/vfio/[0-9]* >/dev/null 2>&1; then echo tpu
  else echo cpu; fi
}

python() {
  local found
  for found in ${FM_PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
    if "$found" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v "$found"; return
    fi
  done
  return 1
}

install() {
  local kind="$1" extras="test${FM_EXTRAS:+,$FM_EXTRAS}" interpreter
  case "$kind" in
    cpu) ;;
    cuda | tpu) extras="$extras,$kind" ;;
    *) fail "FM_ACCELERATOR must be cpu, cuda or tpu; got $kind." ;;
  esac
  [[ "$extras" =~ ^[a-z0-9]+(,[a-z0-9]+)*$ ]] || fail "FM_EXTRAS must be names with commas between them; got '$FM_EXTRAS'."
  if [ -e "$venv" ] && [ ! -w "$venv" ]; then  # as in an image, where root installed
    fail "FM_VENV must be writable to install for ${wanted%% *}; got $venv, where '${found%% *}' is installed. Ask for that by FM_ACCELERATOR and FM_EXTRAS, or set FM_VENV."
  fi
  if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
    fail "FM_VENV must be empty or a virtual environment; got $venv."
  fi
  echo "First use: installing fm_jax for $kind into $venv" >&2
  if command -v uv >/dev/null 2>&1; then
    interpreter="$(python || echo '>=3.11')"
    uv venv --quiet --clear --python "$interpreter" "$venv"
    uv pip install --quiet --python "$venv/bin/python" --constraint "$pins" --editable "${root}[$extras]"
  else
    interpreter="$(python)" || fail "Python 3.11 or newer must be on PATH; got none. Install it, or uv, which brings its own."
    "$interpreter" -m venv --clear "$venv" || fail "$interpreter must be able to make virtual environments. On Debian or Ubuntu: apt install python3-venv. Or install uv."
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$pins" --editable "${root}[$extras]"
  fi
}

# What an installation follows from. It is written last, so half of one is made anew;
# one with extras serves also those who ask for none.
kind="$(accelerator)"
sums="$(cat "$root/pyproject.toml" "$pins" | cksum)"
wanted="$kind${FM_EXTRAS:+,$FM_EXTRAS} $sums"
found="$(cat "$venv/.fm_jax" 2>/dev/null || true)"
[ -n "${FM_EXTRAS:-}" ] || [[ "$found" != "$kind,"*" $sums" ]] || wanted="$found"
if [ "$found" != "$wanted" ]; then
  # Several may come at once, as an array's tasks do: one installs, and the others wait.
  if command -v flock >/dev/null 2>&1 && [ -w "$(dirname "$venv")" ]; then
    exec 9>"$venv.lock"
    flock 9
    found="$(cat "$venv/.fm_jax" 2>/dev/null || true)"
  fi
  if [ "$found" != "$wanted" ]; then
    install "$kind"
    echo "$wanted" >"$venv/.fm_jax"
  fi
  exec 9>&-
fi

export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"
# shellcheck source=launch/gpu.env
[ "$kind" != cuda ] || . "$root/launch/gpu.env"
# An empty array counts as unset in the bash of macOS.
[ -z "${options[*]:-}" ] || set -- python "$root/launch/local.py" "${options[@]}" "$@"
exec "$@"
