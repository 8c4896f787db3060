"""What pyproject.toml cannot say: the CPU kernels' C++ sources lie in cuda/host; an installation carries them inside
workers/kernels, where they are compiled on first use."""

from setuptools import find_packages, setup

HOST_SOURCES = "workers.kernels.host_sources"

setup(
    packages=[*find_packages(include=["cluster*", "workers*", "loadtests*"]), HOST_SOURCES],
    package_dir={HOST_SOURCES: "cuda/host"},
)
