/venv/bin/python -P -m prottrans_hpc.launch.farm_item /data/bfd.farm/01-scan 0 1 TOKEN
/venv/bin/python -P -m prottrans_hpc.launch.farm_item /data/bfd.farm/01-scan 1 1 TOKEN
/venv/bin/python -P -m prottrans_hpc.launch.farm_item /data/bfd.farm/01-scan 2 1 TOKEN
/venv/bin/python -P -m prottrans_hpc.launch.farm_item /data/bfd.farm/01-scan 3 1 TOKEN
