#!/bin/bash
# What train.sbatch and sweep.sbatch become: runs the command in every task of the job,
# then ends the job, or queues it again.
#
# Statuses of fm: 0 done; 2 a mistake, 76 diverged, 1 an error: not again. 75 stopped and
# saved, 85 hung, 128+n killed: again.
set -uo pipefail

[ $# -gt 0 ] || { echo "launch/slurm: a command must follow the script's name. Example: sbatch launch/slurm/train.sbatch fm train --config=... --workdir=..." >&2; exit 2; }
# Installed here once, so that not every task does it; they find it.
"$FM_HOME/launch/local.sh" true || exit 2

# srun tells one status for all, of a mistake in one task the 143 of those that it then
# killed. So each task leaves its own, in a folder that all nodes see. Of one that stopped
# as asked srun hears nothing: the others are about to, and need not be killed.
statuses="$PWD/.fm-statuses-$SLURM_JOB_ID"
rm -rf "$statuses"
mkdir "$statuses" || { echo "launch/slurm: the folder of submission must be writable; got $PWD." >&2; exit 2; }
trap ':' TERM # scancel tells this shell too, and the tasks still have to save
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
  trap ":" TERM
  statuses="$1"; shift
  "$@"; status=$?
  echo "$status" >"$statuses/$SLURM_PROCID"
  [ "$status" != 75 ] || exit 0
  exit "$status"' fm "$statuses" "$FM_HOME/launch/local.sh" "$@" &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step"; done # a signal ends a wait early
wait "$step"
status=$?

again() { case "$1" in 130) return 1 ;; 75 | 85 | 129 | 1[345][0-9]) ;; *) return 1 ;; esac; }

# Without a task's own status it is srun or a node that failed, which is no mistake.
[ "$status" = 0 ] || again "$status" || status=85
for file in "$statuses"/*; do
  [ -e "$file" ] || continue
  own="$(cat "$file")"
  # What one says that may not go on counts for all; next that all has stopped.
  if [ "$own" != 0 ] && ! again "$own"; then status="$own"; break; fi
  [ "$own" != 75 ] || status=75
done
rm -rf "$statuses"
echo "launch/slurm: status $status, restart ${SLURM_RESTART_COUNT:-0}"
again "$status" || exit "$status"

# One task of an array has the array's own number: by that all would be meant.
job="$SLURM_JOB_ID"
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
# After scancel the job is COMPLETING here; preempted or out of time it is RUNNING.
# Queued again the one that was cancelled would rise from the dead.
[ "$(squeue --noheader --jobs="$job" --format=%T 2>/dev/null)" = RUNNING ] || exit "$status"
if [ "${SLURM_RESTART_COUNT:-0}" -ge "${FM_MAX_RESTARTS:-100}" ]; then
  echo "launch/slurm: not queued again after FM_MAX_RESTARTS=${FM_MAX_RESTARTS:-100} restarts." >&2
  exit "$status"
fi
scontrol requeue "$job" && sleep 60 # which ends this script
exit "$status"
