#!/bin/bash
# A Slurm job that trains on 2 machines with 4 GPUs each:  sbatch examples/slurm.sh [key=value ...]
#
# Two minutes before its time is over, Slurm sends SIGUSR1. The run then saves its step and asks
# Slurm to run this job again, which resumes from there; so it goes on until the last step.
# The working directory, with checkpoints/, logs/ and data/, has to be one that all machines see.

#SBATCH --job-name=pocketlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

# one process for each GPU; what a process is told to stop by is what ends the others
srun --kill-on-bad-exit=1 python train.py --config "${CONFIG:-presets/gpt2_124m.yaml}" \
    hardware.accelerator=cuda \
    hardware.devices="$SLURM_NTASKS_PER_NODE" \
    hardware.num_nodes="$SLURM_NNODES" \
    "$@"
