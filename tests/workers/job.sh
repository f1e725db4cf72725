#!/bin/sh
# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# A job with two workers: sbatch --array=1-2 job.sh URL STUDY TRIALS_PER_WORKER
python=~/hpc_db/hpc_db/python/bin/python
log=~/workers/$2.$SLURM_JOB_ID
$python ~/workers/worker.py "$1" "$2" "$3" "$log.1" &
first=$!
$python ~/workers/worker.py "$1" "$2" "$3" "$log.2" && wait $first
