"""Kernel settings of the layers that tests make; the fixture `route` puts each route in turn there."""

from expertune.kernels.routes import KernelSettings

SETTINGS = KernelSettings(name="tests")
