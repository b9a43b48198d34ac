"""The login node's side: the command `prottrans`, the planner, job scripts and what starts them.

Nothing here imports torch, numpy, h5py or the ranks' side, so that a command line answers at once on a bare
login node. A job's work is reached only as `python -m prottrans_hpc STAGE RUN_DIR` or through `stage.run_stage`.
"""
