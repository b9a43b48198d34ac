/venv/bin/python -P -m prottrans_hpc.launch.farm_item /data/bfd.h5.farm/embed 0 1 TOKEN
/venv/bin/python -P -m prottrans_hpc.launch.farm_item /data/bfd.h5.farm/embed 1 1 TOKEN
/venv/bin/python -P -m prottrans_hpc.launch.farm_item /data/bfd.h5.farm/embed 2 1 TOKEN
/venv/bin/python -P -m prottrans_hpc.launch.farm_item /data/bfd.h5.farm/embed 3 1 TOKEN
