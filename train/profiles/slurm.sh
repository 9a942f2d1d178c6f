#!/bin/bash
# Training on a SLURM cluster that never loses a run: asked to stop ahead of the time limit or by preemption, the ranks
# write a checkpoint and leave, and the job is queued again until status.json says "finished".
#
#     sbatch --nodes=2 --gpus-per-node=8 train/profiles/slurm.sh OUT SCRIPT [OPTIONS of the script ...]
#     sbatch ... train/profiles/slurm.sh runs/h14 train/pretrain.py --config train/recipes/clips_84.yaml
#
# LAUNCHER=accelerate (default; PROFILE names a file in train/profiles) or LAUNCHER=torchrun.
#SBATCH --job-name=encoder-swap
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
out=$1 script=$2
shift 2
nodes=${SLURM_JOB_NUM_NODES:-1} gpus=${SLURM_GPUS_ON_NODE:-1}
head=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}" | head -n 1)
export HEAD=$head NODES=$nodes GPUS=$gpus PORT=${PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 20000))}

case ${LAUNCHER:-accelerate} in
accelerate)
    if [ "$nodes" -gt 1 ]; then profile=${PROFILE:-ddp_nodes}; else profile=${PROFILE:-ddp}; fi
    # $SLURM_NODEID differs from machine to machine, so a shell on each of them reads it.
    launch='accelerate launch --config_file "train/profiles/$PROFILE.yaml" --num_machines "$NODES" \
        --num_processes "$((NODES * GPUS))" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$HEAD" --main_process_port "$PORT" "$@"'
    export PROFILE=$profile ;;
torchrun)
    launch='torchrun --nnodes "$NODES" --nproc_per_node "$GPUS" --node_rank "$SLURM_NODEID" \
        --master_addr "$HEAD" --master_port "$PORT" "$@"' ;;
*)
    echo "LAUNCHER is ${LAUNCHER} but must be accelerate or torchrun" >&2
    exit 2 ;;
esac

# SLURM signals this shell (B: above). Launchers do not hand a signal on as it is, so the ranks are asked directly.
# They can be asked once they are all there; until then, again.
asked='' job=''
ask_ranks() {
    asked=yes
    [ -n "$job" ] || return
    while kill -0 "$job" 2>/dev/null && ! srun --overlap --ntasks-per-node=1 python -m train.signals "$out"; do sleep 5; done
}
trap ask_ranks USR1 TERM
rm -f "$out/status.json" # the last job's
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" bash -c "$launch" bash "$script" --run.out "$out" "$@" --resume &
job=$!
[ -z "$asked" ] || ask_ranks # the signal came before there was a job
wait "$job"
code=$?
while kill -0 "$job" 2>/dev/null; do # a trapped signal ends `wait` early
    wait "$job"
    code=$?
done

state=unknown
[ ! -f "$out/status.json" ] ||
    state=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["state"])' "$out/status.json")
echo "launcher ended with $code, the run is $state"
case $state in
finished) exit 0 ;;
failed) exit 1 ;;
preempted) scontrol requeue "${SLURM_JOB_ID:-0}" ;;
*) # ended before it could say so: again, if that is because it was asked to
    [ -n "$asked" ] || exit 1
    scontrol requeue "${SLURM_JOB_ID:-0}" ;;
esac
