# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One MALA worker; job.sh starts many. Put your own data here: this file is yours and is never overwritten."""

import os

import mala

parameters = mala.Parameters()
# On several GPUs of a node, srun or mpirun starts one process per GPU. SLURM_NTASKS is not used: if this job was
# submitted inside another one, it may be that of the other job.
sizes = [os.environ.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")]
if set(sizes) != {"1"}:
    parameters.optuna_singlenode_setup(wait_time=int(os.environ["HPC_DB_WAIT_TIME"]))

parameters.data.input_rescaling_type = "feature-wise-standard"
parameters.data.output_rescaling_type = "minmax"
parameters.running.max_number_epochs = 20
parameters.running.mini_batch_size = 40
parameters.running.optimizer = "Adam"

parameters.hyperparameters.direction = "minimize"
parameters.hyperparameters.n_trials = int(os.environ["HPC_DB_TRIALS"])
parameters.hyperparameters.checkpoint_name = os.environ["HPC_DB_STUDY"]
parameters.hyperparameters.study_name = os.environ["HPC_DB_STUDY"]
parameters.hyperparameters.rdb_storage = os.environ["HPC_DB_URL"]
if os.environ["HPC_DB_OUTAGE"]:
    # MALA fails trials without a heartbeat for twice this interval. A single worker that cannot reach the running
    # server sends none for up to the max outage, so the interval has to be longer.
    parameters.hyperparameters.rdb_storage_heartbeat = int(os.environ["HPC_DB_OUTAGE"]) + 60

data = mala.DataHandler(parameters)
folder = "."  # where the job was submitted
data.add_snapshot("snapshot0.in.npy", folder, "snapshot0.out.npy", folder, "tr")
data.add_snapshot("snapshot1.in.npy", folder, "snapshot1.out.npy", folder, "va")
data.prepare_data()

search = mala.HyperOpt(parameters, data)
search.add_hyperparameter("float", "learning_rate", 0.0000001, 0.01)
search.add_hyperparameter("int", "ff_neurons_layer_00", 10, 100)
search.add_hyperparameter("categorical", "layer_activation_00", choices=["ReLU", "Sigmoid", "LeakyReLU"])
search.perform_study()
