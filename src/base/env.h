// Every environment variable that the library reads, in one place (docs/architecture.md lists
// them).
#pragma once

namespace flashmoe {

// FLASHMOE_TIMEOUT_S: bound of every wait in seconds; 0 means none. Default 60.
double env_timeout_seconds();

// FLASHMOE_NUM_THREADS: compute threads of a rank; 0 or unset: the cores this process may run on,
// divided by the ranks that share them.
int env_num_threads();

// LOCAL_WORLD_SIZE (torchrun), OMPI_COMM_WORLD_LOCAL_SIZE (Open MPI) or SLURM_NTASKS_PER_NODE:
// processes of this job on this machine; 1 when none is set.
int env_local_world_size();

}  // namespace flashmoe
