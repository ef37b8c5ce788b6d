"""The tests: a package, as torch-fidelity installs one of this name, which would hide a folder that is none."""
