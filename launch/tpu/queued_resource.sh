#!/usr/bin/env bash
# Train on a Cloud TPU slice that its queue gives (a queued resource), by gcloud.
#
#   export NAME=fm ZONE=us-east5-b TYPE=v6e-16 RUNTIME=v2-alpha-tpuv6e
#   launch/tpu/queued_resource.sh create   # SPOT=1: for less, and may be taken back
#   launch/tpu/queued_resource.sh status   # until it says ACTIVE
#   launch/tpu/queued_resource.sh sync     # the last commit to all workers; installs it
#   launch/tpu/queued_resource.sh run fm train --config=... --workdir=/mnt/runs/a
#   launch/tpu/queued_resource.sh delete
#
# --workdir must be on a disk that all workers have mounted, such as Filestore. A slice
# that was taken back says SUSPENDED: delete, create, sync and the same run go on from
# the last checkpoint. `run` lasts as long as its connection: start it where that stays.
# DRY=1 prints the commands in place of running them.
set -euo pipefail

fail() { echo "launch/tpu/queued_resource.sh: $*" >&2; exit 2; }

do_() { if [ -n "${DRY:-}" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }

need() {
  local name
  for name in "$@"; do
    [ -n "${!name:-}" ] || fail "$name must be set; got nothing. The script's head shows how."
  done
}

# shellcheck disable=SC2153  # the user sets NAME
all_workers() { do_ gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }

# Ubuntu's own Python may be older than ours; uv brings one.
# shellcheck disable=SC2016  # HOME is the worker's
environ='export PATH="$HOME/.local/bin:$PATH" FM_ACCELERATOR=tpu FM_COORDINATOR=auto'
install='command -v uv >/dev/null || python3 -m pip install --quiet --user uv'

verb="${1:-}"
[ $# -eq 0 ] || shift
[ "$verb" = run ] || [ $# -eq 0 ] || fail "$verb must be alone; got '$1' after it."
case "$verb" in
  create | sync | run | status | delete) need NAME ZONE ;;
  *) fail "the command must be create, sync, run, status or delete; got '$verb'." ;;
esac
case "$verb" in
  create)
    need TYPE RUNTIME
    do_ gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
      --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${SPOT:+--spot}
    ;;
  sync)
    cd "$(dirname "${BASH_SOURCE[0]}")/../.."
    do_ mkdir -p dist
    do_ git archive --output=dist/fm_jax.tgz HEAD
    do_ gcloud compute tpus tpu-vm scp dist/fm_jax.tgz "$NAME:" --zone="$ZONE" --worker=all
    all_workers "mkdir -p fm_jax && tar -xzf fm_jax.tgz -C fm_jax && $environ && { $install; } && fm_jax/launch/local.sh true"
    ;;
  run)
    [ $# -gt 0 ] || fail "run must be given a command; got none. Example: run fm train --config=..."
    # Each worker gets the same words; jax asks the TPU's own services who is who.
    all_workers "cd fm_jax && $environ && exec ./launch/local.sh$(printf ' %q' "$@")"
    ;;
  status) do_ gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format='value(state.state)' ;;
  delete) do_ gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet ;;
esac
