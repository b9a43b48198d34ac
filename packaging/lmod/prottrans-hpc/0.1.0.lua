-- Lmod modulefile of prottrans-hpc: copy it to MODULEPATH/prottrans-hpc/VERSION.lua; the file's name is the version.
-- The package is expected in a virtual environment, made as packaging/README.md says; change `root` where it lies elsewhere.
local version = myModuleVersion()
local root = pathJoin("/opt/apps/prottrans-hpc", version)

help([[
Train, resume and use the ProtTrans protein language models: prottrans --help
]])

whatis("Name: prottrans-hpc")
whatis("Version: " .. version)
whatis("Category: bioinformatics, machine learning")
whatis("Description: pre-training and embedding with protein language models")

if mode() == "load" and not isFile(pathJoin(root, "bin", "prottrans")) then
   LmodError("prottrans-hpc ", version, " is not installed in ", root)
end

prepend_path("PATH", pathJoin(root, "bin"))
setenv("PROTTRANS_HPC_ROOT", root)
-- Packages in a home folder must not replace those of the module.
setenv("PYTHONNOUSERSITE", "1")
